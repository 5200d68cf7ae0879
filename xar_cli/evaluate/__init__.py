"""The `fid` stage: how near generated images come to real ones, by protocols named with every number."""

from xar_cli.evaluate.evaluation import Settings, check_inputs, evaluate, identify_inputs, make_statistics
from xar_cli.evaluate.results import Evaluation

__all__ = ["Evaluation", "Settings", "check_inputs", "evaluate", "identify_inputs", "make_statistics"]
