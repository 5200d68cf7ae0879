"""Rectangular cells and the order of entities."""

from __future__ import annotations

import pytest
import torch

from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.model import build_grouping


def grouping(entity: str, size: int = 64):
    config = load_recipe("base", [f"entity={entity}", f"data.image_size={size}"])
    return build_grouping(config.entity, config.grid)


def test_rectangular_cells_on_a_4_x_4_grid():
    found = grouping("{kind: cell, size: [1, 2]}")
    assert found.lengths == (2,) * 8
    assert found.coordinates[:4].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_centre_out_begins_in_the_middle_and_ends_in_the_corners():
    found = grouping("{kind: token, order: centre_out}")
    assert found.coordinates[:4].tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert found.coordinates[-4:].tolist() == [[0, 0], [0, 3], [3, 0], [3, 3]]


def test_a_permutation_reorders_whole_entities():
    turned = grouping("{kind: cell, size: 2, order: [1, 2, 0, 3]}")  # place -> cell; not its own inverse
    raster = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = turned.to_tokens(raster)
    assert tokens.flatten().tolist() == [2, 3, 6, 7, 8, 9, 12, 13, 0, 1, 4, 5, 10, 11, 14, 15]
    assert (turned.coordinates @ torch.tensor([4.0, 1.0])).tolist() == tokens.flatten().tolist()
    assert torch.equal(turned.to_latents(tokens), raster)
    assert turned.partial_latents(tokens[:, :4])[0, 0].tolist() == [[0, 0, 2, 3], [0, 0, 6, 7], [0] * 4, [0] * 4]


def test_a_list_that_is_no_permutation_is_refused():
    with pytest.raises(UserError) as caught:
        grouping("{kind: cell, size: 2, order: [0, 1, 2, 2]}")
    assert "entity.order must hold each of 0 to 3 once" in caught.value.message


def test_bilinear_scales_take_the_four_tokens_around_the_centre_and_area_scales_take_all():
    latents = torch.arange(16.0).square().view(1, 1, 4, 4)
    area, bilinear = (grouping(f"{{kind: scale, sizes: [1, 2, 4], resize: {mode}}}") for mode in ("area", "bilinear"))
    assert area.to_tokens(latents)[0, 0].item() == 77.5  # of all 16
    assert bilinear.to_tokens(latents)[0, 0].item() == (5**2 + 6**2 + 9**2 + 10**2) / 4
    quarters = [(0 + 1 + 16 + 25) / 4, (4 + 9 + 36 + 49) / 4, (64 + 81 + 144 + 169) / 4, (100 + 121 + 196 + 225) / 4]
    for found in (area, bilinear):  # from 4 x 4 to 2 x 2 the four around a centre are the whole area
        assert found.to_tokens(latents)[0, 1:].flatten().tolist() == [*quarters, *latents.flatten().tolist()]
