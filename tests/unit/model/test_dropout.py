"""Dropout: how many values go, what the others become, and attention that is right on average."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xar_cli.model.attention import block_causal_mask, dot_product_attention
from xar_cli.model.dropout import dropout, keep_mask


def test_a_share_of_values_goes_and_the_mean_stays():
    torch.manual_seed(0)
    found = dropout(torch.ones(100_000), 0.1)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (found == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)


def test_nothing_goes_outside_training_and_with_probability_0():
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x


def test_the_same_seed_drops_the_same():
    def drawn(seed):
        torch.manual_seed(seed)
        return dropout(torch.ones(1000), 0.5)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_masks_of_two_calls_and_places_of_one_have_nothing_in_common():
    torch.manual_seed(0)
    shape = torch.Size((64, 64, 64))
    one, other = ((keep_mask(shape, 0.1).flatten().float() - 0.9) / 0.3 for _ in range(2))

    def correlation(a, b):  # in standard deviations of what chance gives
        return abs((a * b).mean().item()) * len(a) ** 0.5

    assert correlation(one, other) < 5
    for distance in (1, 2, 3, 7, 64, 4096):
        assert correlation(one[distance:], one[:-distance]) < 5


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_any_probability_is_met(probability):
    torch.manual_seed(0)
    dropped = (~keep_mask(torch.Size((1000, 1000)), probability)).float().mean().item()
    assert dropped == pytest.approx(probability, abs=5 * (probability * (1 - probability)) ** 0.5 / 1000)


@pytest.mark.slow
def test_compiled_code_draws_the_same_masks():
    x = torch.randn(3, 5, 77)
    compiled = torch.compile(dropout, options={"fallback_random": True})
    torch.manual_seed(7)
    expected = dropout(x, 0.1)
    torch.manual_seed(7)
    assert torch.equal(compiled(x, 0.1), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_torch_on_average(masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = block_causal_mask((2, 2, 2)) if masked else None
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(dot_product_attention(q, k, v, mask, 0.0), exact, atol=1e-6)
    drawn = torch.stack([dot_product_attention(q, k, v, mask, 0.1) for _ in range(4000)])
    error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all()
    assert (drawn[0] != exact).any()


def test_gradients_pass_the_values_that_stayed():
    x = torch.ones(1000, requires_grad=True)
    found = dropout(x, 0.25)
    found.sum().backward()
    assert torch.equal(x.grad, found.detach())
