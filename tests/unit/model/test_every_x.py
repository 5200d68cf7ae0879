"""What holds for every kind of entity, every order and every context, without golden numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.caches import pixel_recipe
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.train.objective import velocity_loss

SIDE = 8  # of the grid where one is enough
GRIDS = ((8, 8), (4, 6), (6, 2), (1, 6))
EXAMPLES = settings(max_examples=12, deadline=None)  # for each kind and context
every_kind = pytest.mark.parametrize("kind", ["token", "image", "cell", "subsample", "scale"])
every_context = pytest.mark.parametrize("clean", [False, True], ids=["noisy", "clean"])


def network(entity: str, grid: tuple[int, int] = (SIDE, SIDE)) -> XAR:
    size = f"data.image_size={list(grid)}"
    model = XAR(pixel_recipe("model={dim: 16, depth: 1, heads: 2}", size, f"entity={entity}"))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.eval()


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def draw_network(data: st.DataObject, kind: str) -> XAR:
    """A network for a kind with any divisors of any grid, in any order."""
    rows, columns = grid = data.draw(st.sampled_from(GRIDS))
    size = data.draw(st.sampled_from(divisors(rows))), data.draw(st.sampled_from(divisors(columns)))
    if kind == "image":
        return network("{kind: image}", grid)
    if kind == "scale":
        coarse = sorted({(1, 1), size} - {grid})
        resize = data.draw(st.sampled_from(["area", "bilinear"]))
        return network(f"{{kind: scale, sizes: {[list(pair) for pair in (*coarse, grid)]}, resize: {resize}}}", grid)
    count, fields = {
        "token": (rows * columns, ""),
        "cell": (rows // size[0] * (columns // size[1]), f", size: {list(size)}"),
        "subsample": (size[0] * size[1], f", stride: {list(size)}"),
    }[kind]
    order = data.draw(st.one_of(st.sampled_from(["raster", "centre_out"]), st.permutations(range(count))))
    return network(f"{{kind: {kind}{fields}, order: {order if isinstance(order, str) else list(order)}}}", grid)


def inputs(model: XAR, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng, grouping = torch.Generator().manual_seed(seed), model.grouping
    x = torch.randn(2, grouping.num_tokens, 1, generator=rng)
    return x, torch.rand(2, grouping.num_entities, generator=rng), torch.tensor([3, 10])


@every_kind
@every_context
@EXAMPLES
@given(data=st.data())
@torch.no_grad()
def test_a_later_entity_never_changes_an_earlier_velocity(kind, clean, data):
    """Bit for bit, whether the earlier ones are context as they are noised or as they are in the data."""
    model = draw_network(data, kind)
    x_t, t, labels = inputs(model, 0)
    context = inputs(model, 1)[0] if clean else None
    changed = data.draw(st.integers(0, model.grouping.num_entities - 1))
    before = model(x_t, t, labels, context=context)
    place = model.grouping.span(changed)
    x_t[:, place] += 1
    t[:, changed] = 0.123
    if context is not None:
        context[:, place] += 1
    after = model(x_t, t, labels, context=context)
    assert torch.equal(before[:, : place.start], after[:, : place.start])
    assert not torch.equal(before[:, place], after[:, place])


@every_kind
@every_context
@EXAMPLES
@given(data=st.data())
@torch.no_grad()
def test_cached_equals_uncached(kind, clean, data):
    """With clean context the earlier entities are committed as sampling does it: finished, at t = 0."""
    model = draw_network(data, kind)
    x, t, labels = inputs(model, 0)
    context = inputs(model, 1)[0] if clean else None
    whole = model(x, t, labels, context=context)
    cache = model.new_cache(2, torch.float32)
    for j, length in enumerate(model.grouping.lengths):
        place = model.grouping.span(j)
        velocity = model(x[:, place], t[:, j : j + 1], labels, j, cache)
        torch.testing.assert_close(velocity, whole[:, place], rtol=1e-4, atol=1e-5)
        if context is not None:
            model(context[:, place], torch.zeros(2, 1), labels, j, cache)
        cache.commit(length)


@every_kind
@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_ordering_inverts_exactly(kind, data, seed):
    grouping = draw_network(data, kind).grouping
    rows, columns = grouping.grid
    latents = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(grouping.to_latents(grouping.to_tokens(latents)), latents)
    if grouping.num_tokens == rows * columns:  # not the scales
        numbers = torch.arange(rows * columns).float()
        assert torch.equal(grouping.to_tokens(numbers.view(1, 1, rows, columns)).flatten().sort().values, numbers)


@torch.no_grad()
def same(one: str, other: str) -> None:
    """Two ways to say the same entity: equal sequence, equal velocity."""
    first, second = network(one), network(other)
    x, t, labels = inputs(first, 0)
    latents = torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.grouping.to_tokens(latents), second.grouping.to_tokens(latents))
    assert first.grouping.lengths == second.grouping.lengths
    assert torch.equal(first(x, t, labels), second(x, t, labels))


def test_cell_of_size_1_is_token():
    same("{kind: cell, size: 1}", "{kind: token}")


def test_cell_of_the_whole_grid_is_image_and_so_is_one_scale():
    same(f"{{kind: cell, size: {SIDE}}}", "{kind: image}")
    same("{kind: subsample, stride: 1}", "{kind: image}")
    same(f"{{kind: scale, sizes: [{SIDE}]}}", "{kind: image}")


@torch.no_grad()
def test_image_is_plain_flow_matching():
    """One timestep for the whole image, all tokens see all, the loss is that of x_t = (1 - t) x + t noise."""
    model = network("{kind: image}")
    x, t, labels = inputs(model, 0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    expected = (model((1 - t[..., None]) * x + t[..., None] * noise, t, labels) - (noise - x)).square().mean(-1)
    assert torch.equal(velocity_loss(model, x, noise, t, labels, model.grouping.lengths), expected)
    x[:, -1] += 1
    assert (velocity_loss(model, x, noise, t, labels, model.grouping.lengths) != expected).all()


@torch.no_grad()
def test_a_step_of_token_entities_costs_the_context_once_and_nothing_squared():
    """The work of an evaluation is a constant plus a multiple of the context's length."""
    model = network("{kind: token}")
    cache, work = model.new_cache(1, torch.float32), []
    for entity in range(model.grouping.num_entities):
        x, t = torch.randn(1, 1, 1), torch.full((1, 1), 0.5)
        with FlopCounterMode(display=False) as counter:
            model(x, t, torch.tensor([0]), entity, cache)
        work.append(counter.get_total_flops())
        cache.commit(1)
    steps = {after - before for before, after in zip(work[:-1], work[1:], strict=True)}
    assert len(steps) == 1
    assert steps.pop() * len(work) < work[0]  # at this width; the network itself is the larger part
