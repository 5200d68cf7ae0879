"""Everything random in one optimizer step, addressed by (seed, step).

The draws are made for the whole global batch on every rank, and each rank takes its rows: so a step is the same on
1 or 64 ranks, with any accumulation, and after any resume. The cost is small beside the step itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xar_cli.config.schema import Config
from xar_cli.flow.context import draw_timesteps
from xar_cli.model.entities import Grouping

_DRAWS, _DROPOUT, _MIRROR = 1, 2, 3  # streams of one seed that must not meet


@dataclass(frozen=True)
class StepDraws:
    """The random numbers of one optimizer step, or of some of its rows.

    Attributes:
        posterior_noise: (B, C, H, W), for the sample from the tokenizer's posterior.
        t: (B, K), timestep of every entity.
        noise: (B, N, C), the noise end of the interpolant.
        drop_label: (B,) bool, where the label becomes the null class.
    """

    posterior_noise: Tensor
    t: Tensor
    noise: Tensor
    drop_label: Tensor

    def rows(self, rows: slice) -> StepDraws:
        """The draws of some images of the global batch."""
        return StepDraws(self.posterior_noise[rows], self.t[rows], self.noise[rows], self.drop_label[rows])


def draw_step(config: Config, grouping: Grouping, step: int, device: torch.device) -> StepDraws:
    """The draws of step `step` for the whole global batch, on `device`."""
    generator = torch.Generator(device).manual_seed(_seed(_DRAWS, config.train.seed, step))
    batch, channels = config.train.global_batch_size, config.latent_channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return StepDraws(
        posterior_noise=normal(batch, channels, *config.grid),
        t=draw_timesteps(config.train.context, batch, grouping.num_entities, generator),
        noise=normal(batch, grouping.num_tokens, channels),
        drop_label=torch.rand(batch, generator=generator, device=device) < config.train.label_dropout,
    )


def draw_mirrored(seed: int, step: int, batch: int) -> np.ndarray:
    """(batch,) bool: which images of the step's global batch are read as their mirror image, p = 0.5."""
    return np.random.default_rng((_MIRROR, seed, step)).random(batch) < 0.5


def seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Set torch's global generator, which dropout draws from, for one forward and backward pass."""
    torch.manual_seed(_seed(_DROPOUT, seed, step, micro_step, rank))


def _seed(*address: int) -> int:
    return int(np.random.SeedSequence(address).generate_state(1, np.uint64)[0] >> np.uint64(1))
