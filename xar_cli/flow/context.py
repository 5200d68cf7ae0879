"""Timesteps of the entities while training: how noisy the context is (paper, section 3.3 and Table 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def random_timesteps(batch: int, num_entities: int, generator: torch.Generator) -> Tensor:
    """Noisy Context Learning: t = sigmoid(standard normal), drawn for every image and every entity; (B, K)."""
    return torch.sigmoid(torch.randn(batch, num_entities, generator=generator, device=generator.device))
