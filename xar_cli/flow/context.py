"""Timesteps of the entities while training: how noisy the context is (paper, section 3.3 and Table 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from xar_cli.config.schema import Context


def draw_timesteps(context: Context, batch: int, num_entities: int, generator: torch.Generator) -> Tensor:
    """Timestep of every entity of every image, each the sigmoid of a standard normal; (B, K), in (0, 1).

    - `random`: as drawn. Noisy Context Learning, the paper's choice.
    - `increasing`, `decreasing`: the same draws, sorted along the entities: the earlier ones are cleaner, or noisier.
    - `clean`: as drawn, and each is the timestep of an entity as the one to be generated: the entities before it are
      seen at t = 0 (teacher forcing), which is the network's business.
    """
    t = torch.sigmoid(torch.randn(batch, num_entities, generator=generator, device=generator.device))
    if context in ("increasing", "decreasing"):
        return t.sort(dim=1, descending=context == "decreasing").values
    return t
