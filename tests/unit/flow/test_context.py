"""Timesteps of the context, and what each entity sees with clean context."""

from __future__ import annotations

import pytest
import torch

from xar_cli.config import load_recipe
from xar_cli.flow.context import draw_timesteps
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights

ENTITIES = [
    "{kind: cell, size: 8}",  # 64 tokens each: unmasked calls
    "{kind: cell, size: 4}",  # 16 tokens each: one masked call
    "{kind: subsample, stride: 2}",
    "{kind: scale, sizes: [1, 2, 4, 8, 16]}",
    "{kind: image}",
]


def draw(context, seed=0):
    return draw_timesteps(context, 64, 4, torch.Generator().manual_seed(seed))


def test_sorted_contexts_are_the_random_draws_in_order():
    t = draw("random")
    assert t.min() > 0
    assert t.max() < 1
    assert torch.equal(draw("increasing"), t.sort(dim=1).values)
    assert torch.equal(draw("decreasing"), t.sort(dim=1).values.flip(1))
    assert torch.equal(draw("clean"), t)


@pytest.fixture(params=ENTITIES)
def model(request) -> XAR:
    small = ["model.dim=32", "model.depth=1", "model.heads=2", f"entity={request.param}"]
    model = XAR(load_recipe("base", small))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.eval()


def inputs(model: XAR):
    generator = torch.Generator().manual_seed(1)
    shape = (2, model.grouping.num_tokens, 16)
    x, x_t = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    t = torch.rand(2, model.grouping.num_entities, generator=generator)
    return x, x_t, t, torch.tensor([3, 1000])


@torch.no_grad()
def test_clean_context_in_training_is_the_clean_context_of_sampling(model):
    """One teacher-forcing pass gives every entity the velocity that cached sampling would compute for it."""
    x, x_t, t, labels = inputs(model)
    together = model(x_t, t, labels, context=x)
    cache = model.new_cache(2, torch.float32)
    for entity in range(model.grouping.num_entities):
        place = model.grouping.span(entity)
        alone = model(x_t[:, place], t[:, entity : entity + 1], labels, entity, cache)
        torch.testing.assert_close(together[:, place], alone, atol=2e-5, rtol=1e-4)
        model(x[:, place], torch.zeros(2, 1), labels, entity, cache)
        cache.commit(model.grouping.lengths[entity])


@torch.no_grad()
def test_with_clean_context_only_earlier_clean_entities_matter(model):
    x, x_t, t, labels = inputs(model)
    before = model(x_t, t, labels, context=x)
    last = model.grouping.span(model.grouping.num_entities - 1)
    changed = x.clone()
    changed[:, last] += 1
    assert torch.equal(model(x_t, t, labels, context=changed), before)
    noisier = x_t.clone()
    noisier[:, model.grouping.span(0)] += 1
    after = model(noisier, t, labels, context=x)
    assert not torch.equal(after[:, model.grouping.span(0)], before[:, model.grouping.span(0)])
    rest = slice(model.grouping.lengths[0], None)
    assert torch.equal(after[:, rest], before[:, rest])
