"""The order of samples: nothing lost, nothing doubled, whatever the ranks."""

import numpy as np
import pytest

from xar_cli.data.sharding import SampleStream, micro_batch


@pytest.mark.parametrize(("num_samples", "batch"), [(10, 4), (7, 7), (5, 12), (1, 3), (100, 1)])
def test_each_epoch_holds_every_sample_once(num_samples, batch):
    stream = SampleStream(num_samples, batch, seed=3)
    steps = -(-num_samples * 4 // batch)
    order = np.concatenate([stream.indices(step) for step in range(steps)])[: num_samples * 4]
    for epoch in order.reshape(4, num_samples):
        assert sorted(epoch) == list(range(num_samples))


def test_the_order_is_a_stored_one():
    stream = SampleStream(8, 6, seed=0)  # a resumed run must find the order of the version that began it
    assert stream.indices(0).tolist() == [2, 4, 3, 6, 5, 0]
    assert stream.indices(1).tolist() == [1, 7, 1, 3, 7, 6]


def test_epochs_and_seeds_differ():
    stream = SampleStream(50, 50, seed=1)
    assert stream.indices(0).tolist() != stream.indices(1).tolist()
    assert stream.indices(0).tolist() != SampleStream(50, 50, seed=2).indices(0).tolist()


def test_a_step_is_found_without_those_before():
    walked, fresh = SampleStream(13, 5, seed=4), SampleStream(13, 5, seed=4)
    steps = [walked.indices(step) for step in range(40)]
    for step in (39, 7, 20, 0):
        assert np.array_equal(fresh.indices(step), steps[step])


def test_epoch_counts_passes():
    assert SampleStream(10, 4, seed=0).epoch(5) == 2.0


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 4), (3, 2), (12, 1)])
def test_ranks_and_micro_steps_share_out_the_same_step(world_size, accumulation):
    parts = [
        np.arange(12)[micro_batch(12, rank, world_size, micro_step, accumulation)]
        for micro_step in range(accumulation)
        for rank in range(world_size)
    ]
    assert np.concatenate(parts).tolist() == list(range(12))
    assert {len(part) for part in parts} == {12 // world_size // accumulation}


@pytest.mark.parametrize("arguments", [(10, 0, 3), (2, 0, 4), (8, 2, 2), (8, 0, 2, 1, 1), (8, -1, 2)])
def test_an_uneven_or_impossible_share_is_refused(arguments):
    with pytest.raises(ValueError):
        micro_batch(*arguments)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError):
        SampleStream(0, 4, seed=0)
