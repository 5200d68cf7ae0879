"""The `fid` stage: how near generated images come to real ones, by protocols named with every number."""

from xar_cli.evaluate.evaluation import Evaluation, Settings, evaluate, make_statistics

__all__ = ["Evaluation", "Settings", "evaluate", "make_statistics"]
