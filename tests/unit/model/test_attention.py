"""Block-causal attention and the cache of keys and values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xar_cli.model.attention import KVCache, block_causal_attention, block_causal_mask


def test_mask_by_hand():
    mask = block_causal_mask((1, 2), past=1)
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True], [True, True, True, True]]


@pytest.mark.parametrize("lengths", [(40,), (64, 64), (32, 48, 40), (2, 2, 2), (1, 4, 16)])
@pytest.mark.parametrize("past", [0, 5])
def test_all_paths_agree_with_a_dense_mask(lengths, past):
    tokens = sum(lengths)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (tokens, past + tokens, past + tokens))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=block_causal_mask(lengths, past))
    torch.testing.assert_close(block_causal_attention(q, k, v, lengths), dense, rtol=1e-5, atol=1e-5)


def test_later_tokens_do_not_reach_earlier_entities():
    q, k, v = (torch.randn(1, 1, 96, 8) for _ in range(3))
    before = block_causal_attention(q, k, v, (32, 32, 32))
    k[:, :, 64:], v[:, :, 64:] = 9, 9
    after = block_causal_attention(q, k, v, (32, 32, 32))
    assert torch.equal(before[:, :, :64], after[:, :, :64])
    assert not torch.equal(before[:, :, 64:], after[:, :, 64:])


def test_cache_overwrites_until_commit_and_keeps_after():
    cache = KVCache(1, 2, 1, 6, 4, torch.device("cpu"), torch.float32)
    first, second, third = (torch.full((2, 1, 2, 4), float(value)) for value in (1, 2, 3))
    cache.layer(0).extend(first, first)
    keys, _ = cache.layer(0).extend(second, second)
    assert keys.shape[2] == 2
    assert (keys == 2).all()
    cache.commit(2)
    keys, values = cache.layer(0).extend(third, third)
    assert keys[0, 0, :, 0].tolist() == values[1, 0, :, 3].tolist() == [2, 2, 3, 3]
    keys, _ = cache.rows(1).layer(0).extend(first[:1], first[:1])
    assert keys.shape == (1, 1, 4, 4)
    assert cache.keys[0, :, 0, 2, 0].tolist() == [1, 3]  # a view: its row was written, the other one was not
