"""The sampler does no more work than it did: kernels, bytes, FLOP, casts, graphs, counted without a clock."""

from __future__ import annotations

import pytest
import torch

from benchmarks import structure
from xar_cli.model.attention import LayerCache


@pytest.mark.slow
def test_counts_stay_within_their_limits():
    assert structure.past_limits(structure.count()) == []


@pytest.mark.parametrize("copy", ["cat", "clone", "itself"])
def test_a_copy_of_the_cache_is_seen(monkeypatch, copy):
    """Whether it grows by concatenation, is cloned, or is written over itself, though no value changes."""
    real = LayerCache.seen

    def seen(self, tokens):
        keys, values = real(self, tokens)
        if copy == "cat":
            keys = torch.cat([keys[:, :, :-tokens], keys[:, :, -tokens:]], dim=2)
        elif copy == "clone":
            keys = keys.clone()
        else:
            values.copy_(values.clone())
        return keys, values

    config = structure.small_config()
    copied, new = structure.cache_traffic(config)
    assert copied == new
    monkeypatch.setattr(LayerCache, "seen", seen)
    assert structure.cache_traffic(config)[0] > 2 * new
