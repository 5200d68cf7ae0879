"""Entities, the X of next-X prediction (paper, section 3.2): which tokens make entity j, and in which order.

The one file that knows the kinds of entity. Model, mask, sampler and loss read only a `Grouping`.
Legend: B batch, C channels, H and W the latent grid, N tokens of the sequence, K entities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_cli.config.schema import EntityConfig


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

    @property
    def ends(self) -> tuple[int, ...]:
        """For each entity, where its tokens end in the sequence."""
        return tuple(sum(self.lengths[: j + 1]) for j in range(self.num_entities))

    def span(self, entity: int) -> slice:
        """The place of one entity's tokens in the sequence."""
        end = self.ends[entity]
        return slice(end - self.lengths[entity], end)

    def to_tokens(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C), entity after entity."""
        raise NotImplementedError

    def to_latents(self, tokens: Tensor) -> Tensor:
        """(B, N, C) in entity order -> (B, C, H, W)."""
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


@dataclass(frozen=True)
class ScalePyramid(Grouping):
    """Entity j is the whole latent, downsampled to sizes[j]; the last one is the latent itself."""

    sizes: tuple[tuple[int, int], ...]

    def to_tokens(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C): every scale in raster order, coarse to fine."""
        scales = [F.interpolate(latents, size=size, mode="area") for size in self.sizes]
        return torch.cat([scale.flatten(2).transpose(1, 2) for scale in scales], dim=1)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, C, H, W): the finest scale."""
        return tokens[:, self.span(self.num_entities - 1)].transpose(1, 2).unflatten(2, self.grid)


def build_grouping(entity: EntityConfig, grid: tuple[int, int]) -> Grouping:
    """The grouping that a config asks for, on an (H, W) grid. The config has checked that they fit."""
    height, width = grid
    if entity.kind == "cell":
        return _cells(grid, entity.size, entity.size)
    if entity.kind == "token":
        return _cells(grid, 1, 1)
    if entity.kind == "image":
        return _cells(grid, height, width)
    if entity.kind == "subsample":
        stride = entity.stride
        raster = torch.arange(height * width).view(height, width)
        return _permuted(
            grid, [raster[j // stride :: stride, j % stride :: stride] for j in range(stride**2)]
        )
    sizes = tuple((size, size) for size in entity.sizes)
    centres = [
        torch.cartesian_prod(
            (torch.arange(h) + 0.5) * height / h - 0.5, (torch.arange(w) + 0.5) * width / w - 0.5
        )
        for h, w in sizes
    ]
    return ScalePyramid(grid, tuple(h * w for h, w in sizes), torch.cat(centres), sizes)


def _cells(grid: tuple[int, int], rows: int, columns: int) -> PermutedGrid:
    """Cells of rows x columns tokens; cells in raster order, tokens in raster order inside a cell."""
    height, width = grid
    raster = torch.arange(height * width).view(height, width)
    return _permuted(
        grid,
        [
            raster[top : top + rows, left : left + columns]
            for top in range(0, height, rows)
            for left in range(0, width, columns)
        ],
    )


def _permuted(grid: tuple[int, int], entities: list[Tensor]) -> PermutedGrid:
    """A grouping from the raster indices of every entity."""
    order = torch.cat([entity.flatten() for entity in entities])
    coordinates = torch.stack([order // grid[1], order % grid[1]], dim=1).float()
    return PermutedGrid(grid, tuple(entity.numel() for entity in entities), coordinates, order)
