"""What the sampler will do for one image: solver, steps and guidance of every entity, and what that costs.

Pure arithmetic on a recipe. Legend: K entities, N tokens, D width, M hidden width of the MLP, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from xar_cli.config.schema import Config
from xar_cli.flow.guidance import guidance_scales
from xar_cli.flow.solvers import SOLVERS
from xar_cli.model import build_grouping

TIME_SLACK = 1e-9  # a grid point that rounding puts beside the end of the interval is still inside


@dataclass(frozen=True)
class SamplingPlan:
    """How every entity is integrated.

    Attributes:
        solver: name in `SOLVERS`.
        num_steps: K numbers, network evaluations of each entity.
        guidance: K guidance scales; 1 is unguided.
        interval: lowest and highest t at which guidance is applied.
    """

    solver: str
    num_steps: tuple[int, ...]
    guidance: tuple[float, ...]
    interval: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def of(cls, config: Config) -> SamplingPlan:
        """The plan of a recipe."""
        sample, entities = config.sample, build_grouping(config.entity, config.grid).num_entities
        scale = sample.guidance_scale if config.data.num_classes else 1.0  # without classes both branches are one
        return cls(
            sample.solver,
            sample.entity_steps(entities),
            tuple(guidance_scales(sample.guidance_schedule, scale, entities)),
            sample.guidance_interval,
        )

    @property
    def guided(self) -> bool:
        """Whether any entity needs the null branch at all."""
        return any(scale != 1 for scale in self.guidance)

    def scale(self, entity: int, t: float) -> float:
        """Guidance scale of an entity at a timestep; 1 is unguided."""
        low, high = self.interval
        return self.guidance[entity] if low - TIME_SLACK <= t <= high + TIME_SLACK else 1.0

    def evaluations(self) -> Evaluations:
        """How often the network runs for one image."""
        null = 0
        for entity, steps in enumerate(self.num_steps):
            null += sum(self.scale(entity, t) != 1 for t in evaluation_times(self.solver, steps))
        return Evaluations(sum(self.num_steps), null, (len(self.num_steps) - 1) * (2 if self.guided else 1))


@dataclass(frozen=True)
class Evaluations:
    """Network passes for one image.

    Attributes:
        conditional: with the image's class.
        null: with the null class, for guidance.
        commits: over finished entities, to keep their keys and values.
    """

    conditional: int
    null: int
    commits: int

    @property
    def total(self) -> int:
        """All passes."""
        return self.conditional + self.null + self.commits


@cache
def evaluation_times(solver: str, num_steps: int) -> tuple[float, ...]:
    """The timesteps at which a solver asks for the velocity, in its order."""
    times: list[float] = []

    def note(x: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        return x

    SOLVERS[solver](note, torch.zeros(1), num_steps, lambda i: torch.zeros(1))
    return tuple(times)


def flops_per_image(config: Config, plan: SamplingPlan) -> float:
    """FLOP (2 x multiply-add) of the matrix products for one image, decoder left out; padding counts as nothing.

    Modulation is counted once for every (class, t), as the sampler computes it.
    """
    model, lengths = config.model, build_grouping(config.entity, config.grid).lengths
    dim, blocks, channels = model.dim, 2 * model.depth, config.latent_channels
    per_token = blocks * (4 * dim**2 + 3 * dim * model.mlp_hidden) + 2 * dim * channels + dim**2
    multiplications = 0.0
    for tokens, context, passes in _passes(lengths, plan):
        attention = 2 * blocks * dim * (context + tokens)
        multiplications += passes * tokens * (per_token + attention)
    times = {t for steps in set(plan.num_steps) for t in evaluation_times(plan.solver, steps)} | {0.0}
    classes = 2 if plan.guided else 1
    multiplications += len(times) * classes * (blocks * 6 * dim**2 + (256 + dim) * dim)
    return 2 * multiplications


def _passes(lengths: tuple[int, ...], plan: SamplingPlan) -> Iterator[tuple[int, int, int]]:
    """(tokens of the pass, tokens of the context before it, how many such passes) for one image."""
    for entity, (tokens, end) in enumerate(zip(lengths, accumulate(lengths), strict=True)):
        times = evaluation_times(plan.solver, plan.num_steps[entity])
        null = sum(plan.scale(entity, t) != 1 for t in times)
        commits = 0 if entity == len(lengths) - 1 else 2 if plan.guided else 1
        yield tokens, end - tokens, len(times) + null + commits
