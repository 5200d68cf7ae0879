"""Micro-batches come in the stream's order, whatever the threads."""

from itertools import islice

import numpy as np
import pytest
import torch

from tests.caches import N, make_cache, make_moments
from xar_cli.data.latents import LatentReader
from xar_cli.data.loader import LatentLoader
from xar_cli.data.sharding import SampleStream


@pytest.fixture
def reader(tmp_path):
    return LatentReader(make_cache(tmp_path / "latents.h5"))


def flips(step: int) -> np.ndarray:
    return np.random.default_rng((9, step)).random(12) < 0.5


def test_ranks_and_micro_steps_read_the_step_together(reader):
    stream = SampleStream(N, 12, seed=0)
    loaders = [LatentLoader(reader, stream, rank, 2, 3, start_step=5, mirrored=flips) for rank in range(2)]
    batches = [list(islice(iter(loader), 6)) for loader in loaders]
    for step in range(2):
        parts = [batches[rank][step * 3 + micro][0] for micro in range(3) for rank in range(2)]
        expected = make_moments().astype(np.float16)[flips(5 + step).astype(int), stream.indices(5 + step)]
        assert torch.equal(torch.cat(parts), torch.from_numpy(expected))
        labels = torch.cat([batches[rank][step * 3 + micro][1] for micro in range(3) for rank in range(2)])
        assert labels.tolist() == (stream.indices(5 + step) % 10).tolist()


def test_a_resumed_loader_goes_on_where_it_would_have_been(reader):
    stream = SampleStream(N, 5, seed=1)
    whole = list(islice(iter(LatentLoader(reader, stream)), 20))
    rest = list(islice(iter(LatentLoader(reader, stream, start_step=12)), 8))
    for (moments, labels), (expected, expected_labels) in zip(rest, whole[12:], strict=True):
        assert torch.equal(moments, expected)
        assert torch.equal(labels, expected_labels)


def test_a_reading_error_reaches_the_caller(reader):
    class Broken:
        def read(self, *_):
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        next(iter(LatentLoader(Broken(), SampleStream(N, 5, seed=1))))


def test_a_batch_that_does_not_divide_is_refused(reader):
    with pytest.raises(ValueError):
        LatentLoader(reader, SampleStream(N, 5, seed=1), 0, 2)
