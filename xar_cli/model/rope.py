"""Two-dimensional axial rotary position embedding: tables from grid coordinates, and the rotation.

Half of a head's dims turn with the row, half with the column; neighbouring dims (2i, 2i + 1) form a pair.
Legend: B batch, N tokens, H heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROPE_BASE = 10000.0


def rope_table(coordinates: Tensor, head_dim: int) -> Tensor:
    """Cosine and sine of every pair's angle.

    The angle of pair i of an axis is coordinate * 10000^(-2i / (head_dim / 2)), i = 0 .. head_dim / 4 - 1.

    Args:
        coordinates: (N, 2) row and column of each token.
        head_dim: E, a multiple of 4.

    Returns:
        (2, N, E / 2) float32: cosines and sines; the first E / 4 pairs belong to the row.
    """
    pairs = torch.arange(head_dim // 4, dtype=torch.float32, device=coordinates.device)
    frequencies = ROPE_BASE ** (-2 * pairs / (head_dim / 2))
    angles = (coordinates.float()[:, :, None] * frequencies).flatten(1)  # (N, E/2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (B, H, N, E) into (a cos - b sin, b cos + a sin), in float32, cast back."""
    cos, sin = table
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)
