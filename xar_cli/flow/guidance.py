"""Classifier-free guidance: its scale for every entity, and the guided velocity (paper, section 4)."""

from __future__ import annotations

from torch import Tensor


def linear_guidance(guidance_scale: float, num_entities: int) -> list[float]:
    """Scale of each entity: from 1 (unguided) for the first, linearly to `guidance_scale` for the last.

    w_j = 1 + (guidance_scale - 1) * j / (K - 1); a single entity gets the whole scale.
    """
    if num_entities == 1:
        return [guidance_scale]
    return [1 + (guidance_scale - 1) * j / (num_entities - 1) for j in range(num_entities)]


def guided_velocity(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """v_uncond + w (v_cond - v_uncond)."""
    return unconditional + scale * (conditional - unconditional)
