"""Every kind of entity: exact small cases, and properties that hold for any of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xar_cli.config.schema import CellEntity, ImageEntity, ScaleEntity, SubsampleEntity, TokenEntity
from xar_cli.model.entities import Grouping, build_grouping


def order_of(grouping: Grouping) -> list[int]:
    """The raster index at each place of the sequence."""
    height, width = grouping.grid
    raster = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    return grouping.to_tokens(raster).flatten().int().tolist()


@st.composite
def groupings(draw) -> Grouping:
    """Any kind of entity on any grid that it fits, in any order that has a name."""
    kind = draw(st.sampled_from(["token", "image", "cell", "subsample", "scale"]))
    size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    grid = size[0] * draw(st.integers(1, 4)), size[1] * draw(st.integers(1, 4))
    order = draw(st.sampled_from(["raster", "centre_out"]))
    if kind == "token":
        entity = TokenEntity(kind="token", order=order)
    elif kind == "image":
        entity = ImageEntity(kind="image")
    elif kind == "cell":
        entity = CellEntity(kind="cell", size=size, order=order)
    elif kind == "subsample":
        entity = SubsampleEntity(kind="subsample", stride=size, order=order)
    else:
        rows, columns = (sorted(draw(st.lists(st.sampled_from(divisors(side)), max_size=3))) for side in grid)
        entity = ScaleEntity(kind="scale", sizes=tuple(dict.fromkeys([*zip(rows, columns, strict=False), grid])))
    assert entity.misfit(grid) is None
    return build_grouping(entity, grid)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@settings(max_examples=60, deadline=None)
@given(groupings())
def test_any_grouping_is_whole(grouping):
    assert sum(grouping.lengths) == grouping.num_tokens == len(grouping.coordinates)
    spans = [grouping.span(j) for j in range(grouping.num_entities)]
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(grouping.num_tokens))
    height, width = grouping.grid
    assert grouping.coordinates.min() >= 0
    assert grouping.coordinates[:, 0].max() <= height - 1
    assert grouping.coordinates[:, 1].max() <= width - 1


@settings(max_examples=60, deadline=None)
@given(groupings(), st.integers(0, 2**16))
def test_latents_survive_the_way_there_and_back(grouping, seed):
    latents = torch.randn(2, 3, *grouping.grid, generator=torch.Generator().manual_seed(seed))
    tokens = grouping.to_tokens(latents)
    assert tokens.shape == (2, grouping.num_tokens, 3)
    assert torch.equal(grouping.to_latents(tokens), latents)


@settings(max_examples=60, deadline=None)
@given(groupings())
def test_coordinates_are_where_the_tokens_lie(grouping):
    """Tokens of a plane equal to its own row (column) number are, at every scale, the coordinate for RoPE."""
    height, width = grouping.grid
    rows = torch.arange(height).float()[:, None].expand(height, width)
    columns = torch.arange(width).float()[None].expand(height, width)
    tokens = grouping.to_tokens(torch.stack([rows, columns])[None])
    torch.testing.assert_close(tokens[0], grouping.coordinates)


@settings(max_examples=60, deadline=None)
@given(groupings(), st.data())
def test_a_partial_image_shows_the_entities_so_far(grouping, data):
    latents = torch.randn(1, 2, *grouping.grid, generator=torch.Generator().manual_seed(1))
    tokens = grouping.to_tokens(latents)
    entity = data.draw(st.integers(0, grouping.num_entities - 1))
    partial = grouping.partial_latents(tokens[:, : grouping.ends[entity]])
    assert partial.shape == latents.shape
    assert torch.isfinite(partial).all()
    if entity == grouping.num_entities - 1:
        assert torch.equal(partial, latents)


def test_cells_in_raster_order():
    assert order_of(build_grouping(CellEntity(kind="cell", size=2), (4, 4))) == [
        0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
    ]  # fmt: skip


def test_subsample_is_strided():
    grouping = build_grouping(SubsampleEntity(kind="subsample", stride=2), (4, 4))
    assert order_of(grouping) == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]


def test_token_and_image_are_raster_order():
    for entity, count in ((TokenEntity(kind="token"), 6), (ImageEntity(kind="image"), 1)):
        grouping = build_grouping(entity, (2, 3))
        assert order_of(grouping) == list(range(6))
        assert grouping.num_entities == count


def test_scales_are_area_averages_with_centred_coordinates():
    grouping = build_grouping(ScaleEntity(kind="scale", sizes=(1, 2, 4)), (4, 4))
    latents = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = grouping.to_tokens(latents)[0, :, 0]
    assert tokens[:5].tolist() == [7.5, 2.5, 4.5, 10.5, 12.5]
    assert grouping.lengths == (1, 4, 16)
    assert grouping.coordinates[:3].tolist() == [[1.5, 1.5], [0.5, 0.5], [0.5, 2.5]]


def test_scales_of_an_oblong_grid_have_the_centres_of_their_own_axes():
    grouping = build_grouping(ScaleEntity(kind="scale", sizes=((1, 1), (1, 3), (2, 6))), (2, 6))
    tokens = grouping.to_tokens(torch.arange(12.0).view(1, 1, 2, 6))[0, :, 0]
    assert tokens[:4].tolist() == [5.5, 3.5, 5.5, 7.5]
    assert grouping.lengths == (1, 3, 12)
    assert grouping.coordinates[:4].tolist() == [[0.5, 2.5], [0.5, 0.5], [0.5, 2.5], [0.5, 4.5]]


def test_every_other_kind_on_a_2_x_4_grid():
    def order(entity):
        return order_of(build_grouping(entity, (2, 4)))

    assert order(CellEntity(kind="cell", size=2)) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order(CellEntity(kind="cell", size=(1, 4))) == list(range(8))
    assert order(CellEntity(kind="cell", size=(2, 1))) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order(SubsampleEntity(kind="subsample", stride=2)) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert order(SubsampleEntity(kind="subsample", stride=(1, 2))) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert order(SubsampleEntity(kind="subsample", stride=(2, 4))) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert order(SubsampleEntity(kind="subsample", stride=2, order=(2, 0, 3, 1))) == [4, 6, 0, 2, 5, 7, 1, 3]
    assert order(TokenEntity(kind="token", order="centre_out")) == [1, 2, 5, 6, 0, 3, 4, 7]


@pytest.mark.parametrize(
    ("entity", "count", "tokens"),
    [
        (TokenEntity(kind="token"), 256, 256),
        (CellEntity(kind="cell", size=2), 64, 256),
        (CellEntity(kind="cell", size=8), 4, 256),
        (SubsampleEntity(kind="subsample", stride=4), 16, 256),
        (ScaleEntity(kind="scale", sizes=(1, 2, 4, 8, 16)), 5, 341),
        (ImageEntity(kind="image"), 1, 256),
    ],
)
def test_counts_on_the_published_grid(entity, count, tokens):
    grouping = build_grouping(entity, (16, 16))
    assert (grouping.num_entities, grouping.num_tokens) == (count, tokens)
