"""The `fid` stage: how near generated images come to real ones, by protocols named with every number."""

from xar_cli.evaluate.evaluation import Evaluator, Settings, check_inputs, evaluate, make_statistics
from xar_cli.evaluate.results import Evaluation

__all__ = ["Evaluation", "Evaluator", "Settings", "check_inputs", "evaluate", "make_statistics"]
