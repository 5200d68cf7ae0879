"""Next-X sampling: entity after entity, each integrated from noise to data, then kept as clean context.

Owns the loop over entities, guidance branches and the KV cache (paper, section 3.4). Knows no files.
Legend: B images, K entities, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from xar_cli.flow.guidance import guided_velocity
from xar_cli.flow.solvers import Solver
from xar_cli.model import XAR, KVCache


class Noise(Protocol):
    """Where the sampler gets its noise from."""

    def draw(self, entity: int, length: int, draws: int) -> Tensor:
        """(draws, B, length, C) standard normal noise of one entity; row 0 is its initial noise."""


@torch.inference_mode()
def sample_latents(
    model: XAR,
    labels: Tensor,
    noise: Noise,
    solver: Solver,
    num_steps: Sequence[int],
    guidance: Sequence[float],
) -> Tensor:
    """Draw latents for a batch of labels.

    Where an entity's guidance scale is exactly 1 its velocity is the conditional one: no null branch is run for it.

    Args:
        model: the network, in eval mode.
        labels: (B,) class labels.
        noise: of every entity; the SDE takes its step noise from there too.
        solver: one of `xar_cli.flow.solvers`.
        num_steps: K numbers, network evaluations of each entity.
        guidance: K guidance scales.

    Returns:
        (B, C, H, W) float32 scaled latents.
    """
    grouping = model.grouping
    batch = labels.shape[0]
    guided = any(scale != 1 for scale in guidance)
    both_labels = torch.cat([labels, torch.full_like(labels, model.null_label)]) if guided else labels
    dtype = model.token_proj.weight.dtype
    cache = model.new_cache(both_labels.shape[0], _compute_dtype(model))
    entities: list[Tensor] = []

    for j, (length, steps, scale) in enumerate(zip(grouping.lengths, num_steps, guidance, strict=True)):
        if j > 0:
            _commit(model, entities[-1], both_labels, j - 1, cache)
        row_labels, entity_cache = (both_labels, cache) if scale != 1 else (labels, cache.rows(batch))

        def velocity(
            x: Tensor,
            t: float,
            j: int = j,
            scale: float = scale,
            row_labels: Tensor = row_labels,
            entity_cache: KVCache = entity_cache,
        ) -> Tensor:
            x = x.to(dtype)
            if scale == 1:
                return model(x, _timestep(t, x), row_labels, j, entity_cache)
            x = torch.cat([x, x])
            conditional, unconditional = model(x, _timestep(t, x), row_labels, j, entity_cache).float().chunk(2)
            return guided_velocity(conditional, unconditional, scale)

        drawn = noise.draw(j, length, steps)
        result = solver(velocity, drawn[0], steps, lambda i, drawn=drawn: drawn[i + 1])  # type: ignore[misc]
        entities.append(result.to(dtype))
    return grouping.to_latents(torch.cat(entities, dim=1)).float()


def _commit(model: XAR, tokens: Tensor, labels: Tensor, entity: int, cache: KVCache) -> None:
    """Keep the keys and values of a finished entity: its clean tokens at t = 0, for every guidance branch."""
    tokens = tokens.repeat(labels.shape[0] // tokens.shape[0], 1, 1)
    model(tokens, _timestep(0.0, tokens), labels, entity, cache)
    cache.commit(tokens.shape[1])


def _timestep(t: float, rows: Tensor) -> Tensor:
    """(B, 1) float32 timesteps for the one entity in `rows`."""
    return torch.full((rows.shape[0], 1), t, dtype=torch.float32, device=rows.device)


def _compute_dtype(model: XAR) -> torch.dtype:
    """The dtype that linear layers give: autocast's where it is on, else the weights'."""
    device = model.token_proj.weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.token_proj.weight.dtype
