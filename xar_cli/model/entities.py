"""Entities, the X of next-X prediction (paper, section 3.2): which tokens make entity j, and in which order.

The one file that tells the kinds of entity apart: model, mask, sampler and loss read only a `Grouping`. What a recipe
may say of each kind stands in config/schema.py.
Legend: B batch, C channels, H and W the latent grid, N tokens of the sequence, K entities.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_cli.config.schema import EntityConfig, Order


@dataclass(frozen=True)
class Grouping:
    """How a latent becomes a sequence of entities, and back.

    Attributes:
        grid: rows and columns (H, W) of the latent.
        lengths: tokens of each entity, in the order of generation; K numbers with sum N.
        coordinates: (N, 2) float, row and column of each token on the H x W grid, for RoPE.
    """

    grid: tuple[int, int]
    lengths: tuple[int, ...]
    coordinates: Tensor

    @property
    def num_entities(self) -> int:
        """K."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """N, the tokens of the whole sequence."""
        return sum(self.lengths)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """For each entity, where its tokens end in the sequence."""
        return tuple(accumulate(self.lengths))

    def span(self, entity: int) -> slice:
        """The place of one entity's tokens in the sequence."""
        end = self.ends[entity]
        return slice(end - self.lengths[entity], end)

    def to(self, device: torch.device) -> Grouping:
        """The grouping whose tensors lie where they are used: fetching them in every step would make the host wait."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def to_tokens(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C), entity after entity."""
        raise NotImplementedError

    def to_latents(self, tokens: Tensor) -> Tensor:
        """(B, N, C) in entity order -> (B, C, H, W)."""
        raise NotImplementedError

    def partial_latents(self, tokens: Tensor) -> Tensor:
        """What the first entities alone show: their tokens (B, n, C), n <= N -> (B, C, H, W)."""
        raise NotImplementedError


@dataclass(frozen=True)
class PermutedGrid(Grouping):
    """Every token of the grid belongs to exactly one entity: the sequence is a permutation of the grid."""

    order: Tensor  # (N,) raster index of the token at each place of the sequence

    def to_tokens(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C), entity after entity."""
        return latents.flatten(2).transpose(1, 2)[:, self.order.to(latents.device)]

    def to_latents(self, tokens: Tensor) -> Tensor:
        """(B, N, C) in entity order -> (B, C, H, W)."""
        raster = torch.empty_like(tokens)
        raster[:, self.order.to(tokens.device)] = tokens
        return raster.transpose(1, 2).unflatten(2, self.grid)

    def partial_latents(self, tokens: Tensor) -> Tensor:
        """What the first entities alone show; 0, the mean of all latents, where no token has come yet."""
        missing = self.num_tokens - tokens.shape[1]
        return self.to_latents(F.pad(tokens, (0, 0, 0, missing)))


@dataclass(frozen=True)
class ScalePyramid(Grouping):
    """Entity j is the whole latent, downsampled to sizes[j]; the last one is the latent itself."""

    sizes: tuple[tuple[int, int], ...]
    resize: str  # mode of F.interpolate

    def to_tokens(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C): every scale in raster order, coarse to fine."""
        scales = [F.interpolate(latents, size=size, mode=self.resize) for size in self.sizes]
        return torch.cat([scale.flatten(2).transpose(1, 2) for scale in scales], dim=1)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, C, H, W): the finest scale."""
        return tokens[:, self.span(self.num_entities - 1)].transpose(1, 2).unflatten(2, self.grid)

    def partial_latents(self, tokens: Tensor) -> Tensor:
        """The newest scale in `tokens`, each of its values repeated over its area."""
        scale = self.ends.index(tokens.shape[1])
        coarse = tokens[:, self.span(scale)].transpose(1, 2).unflatten(2, self.sizes[scale])
        return F.interpolate(coarse, size=self.grid, mode="nearest")


def build_grouping(entity: EntityConfig, grid: tuple[int, int]) -> Grouping:
    """The grouping that a config asks for, on an (H, W) grid. The config has checked that they fit."""
    if entity.kind == "cell":
        return _in_order(_cells(grid, *entity.shape), grid, entity.order)
    if entity.kind == "token":
        return _in_order(_cells(grid, 1, 1), grid, entity.order)
    if entity.kind == "image":
        return _in_order(_cells(grid, *grid), grid, "raster")
    if entity.kind == "subsample":
        return _in_order(_subsamples(grid, *entity.strides), grid, entity.order)
    sizes = entity.shapes
    coordinates = torch.cat([_token_centres(grid, size) for size in sizes])
    return ScalePyramid(grid, tuple(rows * columns for rows, columns in sizes), coordinates, sizes, entity.resize)


def places_in(theirs: Grouping, ours: Grouping) -> Tensor | None:
    """Where each token of ours stands in their sequence, (N,); None where the tokens are not the same.

    What was learned for each place of their sequence, as positions were, is right for ours in this order.
    """
    if isinstance(theirs, PermutedGrid) and isinstance(ours, PermutedGrid) and theirs.grid == ours.grid:
        return theirs.order.argsort()[ours.order]
    same = theirs.lengths == ours.lengths and torch.equal(theirs.coordinates, ours.coordinates)
    return torch.arange(ours.num_tokens) if same else None


def _raster(grid: tuple[int, int]) -> Tensor:
    """(H, W) number of every token in raster order."""
    return torch.arange(grid[0] * grid[1]).view(grid)


def _cells(grid: tuple[int, int], rows: int, columns: int) -> list[Tensor]:
    """Raster numbers of each cell of rows x columns tokens; cells in raster order, tokens in raster order inside."""
    return [cell.flatten() for band in _raster(grid).split(rows) for cell in band.split(columns, dim=1)]


def _subsamples(grid: tuple[int, int], rows: int, columns: int) -> list[Tensor]:
    """Raster numbers of the tokens with (row mod rows, column mod columns) = divmod(j, columns), for each j."""
    raster = _raster(grid)
    return [raster[j // columns :: rows, j % columns :: columns].flatten() for j in range(rows * columns)]


def _in_order(entities: list[Tensor], grid: tuple[int, int], order: Order) -> PermutedGrid:
    """A grouping from the raster numbers of every entity's tokens, the entities themselves in the order asked for."""
    if order == "centre_out":
        centre = torch.tensor([(side - 1) / 2 for side in grid])
        distances = [(_places(entity, grid).mean(0) - centre).norm().item() for entity in entities]
        order = tuple(sorted(range(len(entities)), key=lambda j: (round(distances[j], 6), j)))
    if order != "raster":
        entities = [entities[j] for j in order]
    tokens = torch.cat(entities)
    return PermutedGrid(grid, tuple(entity.numel() for entity in entities), _places(tokens, grid), tokens)


def _places(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, 2) float row and column of tokens given by raster number."""
    return torch.stack([tokens // grid[1], tokens % grid[1]], dim=1).float()


def _token_centres(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(N, 2) centres of the tokens of a coarser grid, in coordinates of the fine one: (r + 0.5) H / s - 0.5."""
    axes = [(torch.arange(coarse) + 0.5) * fine / coarse - 0.5 for fine, coarse in zip(grid, size, strict=True)]
    return torch.cartesian_prod(*axes)
