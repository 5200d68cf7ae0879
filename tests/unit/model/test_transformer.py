"""The network: size, initialisation, condition, padding, and sampling with a cache against without one."""

from __future__ import annotations

import math

import pytest
import torch

from tests.caches import pixel_recipe
from xar_cli.config import load_recipe
from xar_cli.model import XAR
from xar_cli.model.attention import block_causal_attention
from xar_cli.model.transformer import count_parameters, init_weights, rms_norm, timestep_sinusoid

KINDS = (
    "{kind: cell, size: 4}", "{kind: subsample, stride: 2}", "{kind: scale, sizes: [1, 2, 4, 8]}", "{kind: image}",
)  # fmt: skip


def small_model(entity: str = KINDS[0], seed: int = 0, **changes) -> XAR:
    overrides = [f"model.{key}={value}" for key, value in {"dim": 32, "depth": 2, "heads": 2, **changes}.items()]
    model = XAR(pixel_recipe(*overrides, f"entity={entity}"))
    init_weights(model, torch.Generator().manual_seed(seed))
    return model.eval()


def inputs(model: XAR, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    grouping = model.grouping
    x = torch.randn(batch, grouping.num_tokens, model.token_proj.in_features, generator=rng)
    return x, torch.rand(batch, grouping.num_entities, generator=rng), torch.arange(batch)


@pytest.mark.parametrize(("name", "millions"), [("base", 172.6), ("large", 608.4), ("huge", 1186.0)])
def test_published_parameter_counts_on_the_meta_device(name, millions):
    with torch.device("meta"):
        model = XAR(load_recipe(name))
    assert round(count_parameters(model) / 1e6, 1) == millions
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.rope.is_meta


@pytest.mark.parametrize("entity", KINDS)
@torch.no_grad()
def test_cached_equals_uncached(entity):
    model = small_model(entity)
    x, t, labels = inputs(model)
    whole = model(x, t, labels)
    cache = model.new_cache(2, torch.float32)
    for j, length in enumerate(model.grouping.lengths):
        place = model.grouping.span(j)
        velocity = model(x[:, place], t[:, j : j + 1], labels, j, cache)
        torch.testing.assert_close(velocity, whole[:, place], rtol=1e-4, atol=1e-5)
        cache.commit(length)


@torch.no_grad()
def test_several_entities_in_one_cached_pass():
    model = small_model()
    x, t, labels = inputs(model)
    whole = model(x, t, labels)
    cache = model.new_cache(2, torch.float32)
    model(x[:, :32], t[:, :2], labels, 0, cache)
    cache.commit(32)
    torch.testing.assert_close(model(x[:, 32:], t[:, 2:], labels, 2, cache), whole[:, 32:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entity", KINDS)
@torch.no_grad()
def test_an_entity_never_sees_a_later_one(entity):
    model = small_model(entity)
    x, t, labels = inputs(model)
    before = model(x, t, labels)
    last = model.grouping.span(model.grouping.num_entities - 1)
    x[:, last] += 1
    t[:, -1] = 0.123
    after = model(x, t, labels)
    assert torch.equal(before[:, : last.start], after[:, : last.start])
    assert not torch.allclose(before[:, last], after[:, last])


@torch.no_grad()
def test_condition_is_per_entity():
    """Changing the timestep of entity 2 changes its own and later velocities alone."""
    model = small_model()
    x, t, labels = inputs(model)
    before = model(x, t, labels)
    t[:, 2] = 0.9
    after = model(x, t, labels)
    assert torch.equal(before[:, :32], after[:, :32])
    assert not torch.allclose(before[:, 32:48], after[:, 32:48])


def test_timestep_index_is_the_floor_of_a_float32_product():
    grid = torch.linspace(1, 0, 41, dtype=torch.float64)
    indices = [math.floor((value.float() * 1000).item()) for value in grid]
    assert indices != [math.floor(value.item() * 1000) for value in grid]  # so the next lines can tell them apart
    for value, index in zip(grid, indices, strict=True):
        expected = torch.tensor([math.cos(index), math.sin(index)])
        torch.testing.assert_close(timestep_sinusoid(value)[[0, 128]], expected, rtol=1e-4, atol=1e-4)


def test_rms_norm_by_hand():
    torch.testing.assert_close(rms_norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / math.sqrt(12.5 + 1e-6))
    assert rms_norm(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_initial_weights():
    model = small_model(dim=64)
    assert model.class_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.pos_decoder.std().item() == pytest.approx(0.02, rel=0.1)
    block = model.encoder[0]
    bound = math.sqrt(6 / (64 + 3 * 64))  # the fused qkv as one matrix
    assert block.attention.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert block.attention.qkv.bias.abs().max() == 0
    hidden, padded = block.mlp.hidden, block.mlp.fc2.in_features
    bound = math.sqrt(6 / (64 + hidden))  # gate and value each as their own unpadded matrix
    assert block.mlp.fc1.weight[:hidden].abs().max().item() == pytest.approx(bound, rel=0.02)
    assert (hidden, padded) == (170, 192)
    assert block.mlp.fc1.weight[hidden:padded].abs().max() == 0
    assert block.mlp.fc2.weight[:, hidden:].abs().max() == 0


def test_padding_gets_no_gradient_and_is_not_counted():
    model = small_model(dim=64)
    x, t, labels = inputs(model)
    model(x, t, labels).square().mean().backward()
    mlp = model.decoder[1].mlp
    assert mlp.fc1.weight.grad[mlp.hidden : mlp.fc2.in_features].abs().max() == 0
    assert mlp.fc2.weight.grad[:, mlp.hidden :].abs().max() == 0
    assert mlp.fc2.weight.grad[:, : mlp.hidden].abs().max() > 0
    extra = (mlp.fc2.in_features - mlp.hidden) * (2 * 64 + 2 + 64)
    assert count_parameters(model) == sum(p.numel() for p in model.parameters()) - 4 * extra


def test_dropout_acts_in_training_alone():
    model = small_model(dropout=0.5)
    x, t, labels = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(x, t, labels), model(x, t, labels))
        model.train()
        assert not torch.equal(model(x, t, labels), model(x, t, labels))


def test_attention_gets_the_recipes_dropout_in_training_alone():
    model = small_model(dropout=0.25)
    (x, t, labels), asked = inputs(model), []

    def attend(queries, keys, values, lengths, dropout):
        asked.append(dropout)
        return block_causal_attention(queries, keys, values, lengths, dropout)

    block, lengths = model.encoder[0], model.grouping.lengths
    h, condition = model.enter(x, slice(None)), model.condition(t, labels)
    for mode in (model.train, model.eval):
        mode()
        block(h, condition, model.rope, lengths, None, attend)
    assert asked == [0.25, 0.0]
