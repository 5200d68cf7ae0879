"""Two-dimensional rotary positions."""

from __future__ import annotations

import math

import torch

from xar_cli.model.rope import rope_table, rotate


def test_one_token_by_hand():
    """Head width 8: two pairs turn with the row (frequencies 1 and 1/100), two with the column."""
    cos, sin = rope_table(torch.tensor([[3.0, 5.0]]), 8)
    angles = torch.tensor([3.0, 3 * 10000**-0.5, 5.0, 5 * 10000**-0.5])
    torch.testing.assert_close(cos[0], angles.cos())
    torch.testing.assert_close(sin[0], angles.sin())
    x = torch.arange(8.0).view(1, 1, 1, 8)
    first = rotate(x, torch.stack([cos, sin]))[0, 0, 0, :2]
    torch.testing.assert_close(first, torch.tensor([-math.sin(3), math.cos(3)]))


def test_rotation_keeps_lengths_and_dtype():
    table = rope_table(torch.rand(6, 2) * 16, 16)
    x = torch.randn(2, 3, 6, 16)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_products_depend_on_the_difference_of_positions_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(at: tuple[float, float], other: tuple[float, float]) -> torch.Tensor:
        return (rotate(q, rope_table(torch.tensor([at]), 16)) * rotate(k, rope_table(torch.tensor([other]), 16))).sum()

    torch.testing.assert_close(product((2, 3), (5, 1)), product((7, 10), (10, 8)), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(product((2, 3), (5, 1)), product((2, 3), (5, 2)))
