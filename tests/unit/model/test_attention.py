"""Block-causal attention and the cache of keys and values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from xar_cli.model.attention import (
    KVCache,
    attention_runs,
    block_causal_attention,
    block_causal_mask,
    teacher_forcing_attention,
    teacher_forcing_mask,
)

LENGTHS = [
    (40,),
    (64, 64),
    (32, 48, 40),
    (2, 2, 2),
    (1, 4, 16),
    (1,) * 100,
    (4,) * 40,
    (1, 4, 16, 64, 256),
    (31, 2, 33),
]


def test_mask_by_hand():
    mask = block_causal_mask((1, 2), past=1)
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True], [True, True, True, True]]


def test_small_entities_share_a_call_and_large_ones_stand_alone():
    assert attention_runs((1,) * 256) == ((1,) * 64,) * 4
    assert attention_runs((64,) * 4) == ((64,),) * 4
    assert attention_runs((1, 4, 16, 64, 256)) == ((1, 4, 16), (64,), (256,))
    assert attention_runs((16,) * 5) == ((16,) * 4, (16,))


@pytest.mark.parametrize(
    ("lengths", "share"), [((64,) * 4, 10 / 16), ((1,) * 256, 10 / 16), ((16,) * 16, 10 / 16), ((256,), 1)]
)
def test_little_more_than_the_visible_area_is_computed(lengths, share):
    q, k, v = (torch.randn(1, 1, 256, 8) for _ in range(3))

    with FlopCounterMode(display=False) as counter:
        block_causal_attention(q, k, v, lengths)
    assert counter.get_total_flops() == share * 4 * 256**2 * 8


@pytest.mark.parametrize("lengths", LENGTHS)
def test_teacher_forcing_agrees_with_a_dense_mask(lengths):
    tokens = sum(lengths)
    q, k, v = (torch.randn(4, 3, tokens, 8) for _ in range(3))
    clean = F.scaled_dot_product_attention(q[:2], k[:2], v[:2], attn_mask=block_causal_mask(lengths))
    both_k, both_v = (torch.cat(x.chunk(2), dim=2) for x in (k, v))
    noisy = F.scaled_dot_product_attention(q[2:], both_k, both_v, attn_mask=teacher_forcing_mask(lengths))
    found = teacher_forcing_attention(q, k, v, lengths)
    torch.testing.assert_close(found, torch.cat([clean, noisy]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("past", [0, 5])
def test_all_paths_agree_with_a_dense_mask(lengths, past):
    tokens = sum(lengths)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (tokens, past + tokens, past + tokens))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=block_causal_mask(lengths, past))
    torch.testing.assert_close(block_causal_attention(q, k, v, lengths), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "fused", "tolerance"), [(torch.float32, 4, 1e-5), (torch.bfloat16, 0, 2e-2)])
def test_training_without_dropout_takes_the_faster_attention(monkeypatch, dtype, fused, tolerance):
    """On a CPU: torch's kernel in float32, whose backward pass in bf16 takes several times as long as two products."""
    calls = []

    def counted(*arguments, real=F.scaled_dot_product_attention, **options):
        calls.append(1)
        return real(*arguments, **options)

    exact = [torch.randn(2, 3, 256, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    upstream = torch.randn(2, 3, 256, 8)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=block_causal_mask((64,) * 4))
    expected.backward(upstream.double())
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    found = block_causal_attention(*inputs, (64,) * 4)
    found.backward(upstream.to(dtype))
    assert len(calls) == fused
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


def test_later_tokens_do_not_reach_earlier_entities():
    q, k, v = (torch.randn(1, 1, 96, 8) for _ in range(3))
    before = block_causal_attention(q, k, v, (32, 32, 32))
    k[:, :, 64:], v[:, :, 64:] = 9, 9
    after = block_causal_attention(q, k, v, (32, 32, 32))
    assert torch.equal(before[:, :, :64], after[:, :, :64])
    assert not torch.equal(before[:, :, 64:], after[:, :, 64:])


def extend(cache, values):
    """Write these as new keys and values; all keys and values that there are then."""
    for slot in cache.slots(values.shape[2]):
        slot.copy_(values)
    return cache.seen(values.shape[2])


def test_cache_overwrites_until_commit_and_keeps_after():
    cache = KVCache(1, 2, 1, 6, 4, torch.device("cpu"), torch.float32)
    first, second, third = (torch.full((2, 1, 2, 4), float(value)) for value in (1, 2, 3))
    extend(cache.layer(0), first)
    keys, _ = extend(cache.layer(0), second)
    assert keys.shape[2] == 2
    assert (keys == 2).all()
    cache.commit(2)
    keys, values = extend(cache.layer(0), third)
    assert keys[0, 0, :, 0].tolist() == values[1, 0, :, 3].tolist() == [2, 2, 3, 3]
    keys, _ = extend(cache.rows(1).layer(0), first[:1])
    assert keys.shape == (1, 1, 4, 4)
    assert cache.keys[0, :, 0, 2, 0].tolist() == [1, 3]  # a view: its row was written, the other one was not
