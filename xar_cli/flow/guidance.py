"""Classifier-free guidance: its scale for every entity and timestep, and the guided velocity (paper, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Ramp = Callable[[float], float]

# Each schedule maps the entity's place in the order, 0 for the first and 1 for the last, to its share of guidance.
SCHEDULES: dict[str, Ramp] = {
    "linear": lambda place: place,
    "constant": lambda place: 1.0,
    "cosine": lambda place: (1 - math.cos(math.pi * place)) / 2,
}


def guidance_scales(schedule: str, guidance_scale: float, num_entities: int) -> list[float]:
    """Scale of each entity: w_j = 1 + (guidance_scale - 1) * share_j; 1 is unguided.

    The share goes from 0 for the first entity to 1 for the last, linearly or by half a cosine, or is 1 for all. A
    single entity gets the whole scale.

    Args:
        schedule: a name in SCHEDULES; `linear` is the published one.
        guidance_scale: of the last entity.
        num_entities: K.
    """
    ramp = SCHEDULES[schedule]
    if num_entities == 1:
        return [guidance_scale]
    return [1 + (guidance_scale - 1) * ramp(j / (num_entities - 1)) for j in range(num_entities)]


def guided_velocity(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """v_uncond + w (v_cond - v_uncond)."""
    return unconditional + scale * (conditional - unconditional)
