"""The sampler does no more work than it did: kernels, bytes, FLOP, casts, graphs, counted without a clock."""

from __future__ import annotations

import pytest

from benchmarks import structure


@pytest.mark.slow
def test_counts_stay_within_their_limits():
    counts = structure.count()
    past = {name: (counts[name], limit) for name, limit in structure.LIMITS.items() if counts[name] > limit}
    assert not past
