"""Next-X sampling: entity after entity, each integrated from noise to data, then kept as clean context.

Owns the loop over entities and guidance (paper, section 3.4). Knows no files.
Legend: B images, K entities, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from xar_cli.flow.guidance import guided_velocity
from xar_cli.flow.solvers import SOLVERS, STOCHASTIC
from xar_cli.model.entities import Grouping
from xar_cli.sample.network import BatchNetwork, SamplingNetwork
from xar_cli.sample.plan import SamplingPlan

Observer = Callable[[int, float, Tensor], None]


class Noise(Protocol):
    """Where the sampler gets its noise from."""

    def draw(self, entity: int, length: int, draws: int) -> Tensor:
        """(draws, B, length, C) standard normal noise of one entity; row 0 is its initial noise."""


def ignore(entity: int, t: float, x: Tensor) -> None:
    """An observer that looks away."""


@torch.inference_mode()
def sample_latents(
    network: SamplingNetwork, labels: Tensor, noise: Noise, plan: SamplingPlan, observe: Observer = ignore
) -> Tensor:
    """Draw latents for a batch of labels.

    Where an entity's guidance scale is exactly 1 its velocity is the conditional one: no null branch is run for it.

    Args:
        network: prepared for sampling.
        labels: (B,) class labels.
        noise: of every entity; the SDE takes its step noise from there too.
        plan: solver, steps and guidance of every entity.
        observe: is shown (entity, t, x_t (B, N, C)) at every network evaluation, and the result at t = 0.

    Returns:
        (B, C, H, W) float32 scaled latents.
    """
    with network.batch(labels, plan.guided) as batch:
        return _sample(batch, network.grouping, noise, plan, observe)


def _sample(network: BatchNetwork, grouping: Grouping, noise: Noise, plan: SamplingPlan, observe: Observer) -> Tensor:
    """Entity after entity, of one batch."""
    solver = SOLVERS[plan.solver]
    entities: list[Tensor] = []
    for entity, (length, steps) in enumerate(zip(grouping.lengths, plan.num_steps, strict=True)):
        if entity > 0:
            network.commit(entities[-1], entity - 1)

        def velocity(x: Tensor, t: float, entity: int = entity) -> Tensor:
            observe(entity, t, x)
            scale = plan.scale(entity, t)
            if scale == 1:
                return network.velocity(x.float(), t, entity)
            return guided_velocity(*network.both_velocities(x.float(), t, entity), scale)

        drawn = noise.draw(entity, length, steps if plan.solver in STOCHASTIC else 1)
        entities.append(solver(velocity, drawn[0], steps, lambda i, drawn=drawn: drawn[i + 1]).float())  # type: ignore[misc]
        observe(entity, 0.0, entities[-1])
    return grouping.to_latents(torch.cat(entities, dim=1))
