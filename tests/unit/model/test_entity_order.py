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
    plain, turned = grouping("{kind: cell, size: 2}"), grouping("{kind: cell, size: 2, order: [3, 2, 1, 0]}")
    latents = torch.randn(2, 16, 4, 4)
    cells = plain.to_tokens(latents).split(4, dim=1)
    assert torch.equal(turned.to_tokens(latents), torch.cat(cells[::-1], dim=1))
    assert torch.equal(turned.to_latents(turned.to_tokens(latents)), latents)


def test_a_list_that_is_no_permutation_is_refused():
    with pytest.raises(UserError) as caught:
        grouping("{kind: cell, size: 2, order: [0, 1, 2, 2]}")
    assert "entity.order must hold each of 0 to 3 once" in caught.value.message


def test_bilinear_scales_are_another_downsampling():
    latents = torch.randn(1, 16, 4, 4)
    area, bilinear = (grouping(f"{{kind: scale, sizes: [1, 4], resize: {mode}}}") for mode in ("area", "bilinear"))
    assert torch.allclose(area.to_tokens(latents)[:, 0], latents.mean((2, 3)))
    assert not torch.allclose(bilinear.to_tokens(latents)[:, 0], latents.mean((2, 3)))
