"""The learning rate over a run, in fractions of its length (paper, appendix; figures of the published runs)."""

from __future__ import annotations

import math

from xar_cli.config.schema import TrainConfig


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """Learning rate of optimizer step `step`, 0 <= step < total_steps, updated every step.

    Linear from 0 over the first `warmup_fraction`, constant up to `decay_start_fraction`, then half a cosine down
    to `min_lr` at the end.
    """
    progress = step / total_steps
    if progress < train.warmup_fraction:
        return train.lr * progress / train.warmup_fraction
    if progress < train.decay_start_fraction or train.decay_start_fraction == 1:
        return train.lr
    decayed = (progress - train.decay_start_fraction) / (1 - train.decay_start_fraction)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * decayed))
