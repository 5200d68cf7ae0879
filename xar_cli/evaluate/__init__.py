"""The `fid` stage: how near generated images come to real ones, by protocols that are named with every number."""

from xar_cli.evaluate.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
