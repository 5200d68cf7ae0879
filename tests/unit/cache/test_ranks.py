"""Shares of the work: whole, even, and free to change on resume. Real processes: tests/integration."""

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.caches import make_images, pixel_recipe
from tests.thread_ranks import thread_ranks
from xar_cli.cache import CacheSettings, stage
from xar_cli.cache.stage import run_cache, share_of_blocks, summarize
from xar_cli.data.cache_file import CacheFile
from xar_cli.data.latents import LatentReader, LatentWriter
from xar_cli.errors import UserError

NUM = 30
RECIPE = pixel_recipe("data.num_classes=3")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("ranks") / "images", 3, NUM // 3)


def refusals(images, out, world_size=2):
    """What each rank is told by the UserError that it ends with."""
    settings = CacheSettings(images=images, out=out, config=RECIPE, batch_size=4, device="cpu")

    def work(ranks):
        with pytest.raises(UserError) as caught:
            run_cache(settings, ranks)
        return caught.value.message

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, thread_ranks(world_size)))


def run_ranks(images, out, world_size, only=None, **settings):
    """Run all ranks at once, or let those not in `only` leave as soon as the work begins; what each made."""
    chosen = CacheSettings(images=images, out=out, config=RECIPE, batch_size=4, device="cpu", **settings)
    all_ranks = thread_ranks(world_size)

    def work(rank):
        return run_cache(chosen, all_ranks[rank]).num_encoded

    real = stage._encode_share

    def share(*arguments):
        return real(*arguments) if only is None or arguments[-1].rank in only else 0

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(world_size) as pool:
        patch.setattr(stage, "_encode_share", share)
        return list(pool.map(work, range(world_size)))


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "latents.h5"
    run_ranks(images, out, 1)
    return LatentReader(out)


def check_equal(out, alone):
    reader = LatentReader(out)
    assert reader.content_hash == alone.content_hash
    for mirrored in (np.zeros(NUM, bool), np.ones(NUM, bool)):
        assert np.array_equal(reader.read(np.arange(NUM), mirrored)[0], alone.read(np.arange(NUM), mirrored)[0])


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_make_what_one_process_makes(images, tmp_path, alone, world_size):
    counts = run_ranks(images, tmp_path / "x.h5", world_size)
    assert sum(counts) == NUM
    assert max(counts) - min(counts) <= 4  # whole blocks of 4
    assert len(list(tmp_path.glob("x.shard-*.h5"))) == world_size
    check_equal(tmp_path / "x.h5", alone)


@pytest.mark.parametrize(("first", "then"), [(2, 3), (3, 1), (1, 2), (4, 2)])
def test_the_number_of_ranks_may_change_on_resume(images, tmp_path, alone, first, then):
    out = tmp_path / "x.h5"
    run_ranks(images, out, first, only=(0,))
    with LatentWriter(out) as writer:
        for row in range(0, NUM, 7):
            writer._put(row, "written", np.uint8(0))
    left = summarize(out).num_missing
    assert left > 0
    assert sum(run_ranks(images, out, then)) == left
    check_equal(out, alone)


def test_each_rank_writes_its_own_file(images, tmp_path):
    out = tmp_path / "x.h5"
    run_ranks(images, out, 3, only=(0,))
    states = CacheFile(out).states
    first = CacheFile(out).shards[0]
    assert (states[first.start : first.stop] == 1).all()
    assert (states[first.stop :] == 0).all()


def test_shares_cover_all_blocks_once(images, tmp_path):
    out = tmp_path / "x.h5"
    run_ranks(images, out, 3, only=(0,))
    with LatentWriter(out) as writer:
        for world_size in (1, 2, 3, 5):
            shares = [share_of_blocks(writer, 4, rank, world_size) for rank in range(world_size)]
            starts = [block.start for share in shares for block in share]
            assert starts == sorted(set(starts))
            missing = np.flatnonzero(writer.states == 0)
            covered = {row for share in shares for block in share for row in range(block.start, block.stop)}
            assert set(missing.tolist()) <= covered


def test_more_ranks_than_images(tmp_path):
    images = make_images(tmp_path / "images", 3, 1)
    run_ranks(images, tmp_path / "x.h5", 5)
    assert summarize(tmp_path / "x.h5").num_samples == 3


def test_a_second_job_is_refused_while_any_rank_of_the_first_lives(images, tmp_path, monkeypatch):
    out, real, refused = tmp_path / "x.h5", stage._encode_share, []

    def share(*arguments):
        if arguments[-1].rank == 1:  # rank 0 may have gone by now, this one is at work
            with stage.cache_lock(out) as lock, pytest.raises(UserError, match=r"is being written by process \d+ on "):
                lock.take()
            refused.append(1)
        return real(*arguments)

    monkeypatch.setattr(stage, "_encode_share", share)
    run_ranks(images, out, 2)
    assert refused == [1]
    with stage.cache_lock(out) as lock:
        lock.take()


def test_a_disk_that_is_too_small_is_refused_to_all_ranks_and_nothing_is_left(images, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("xar_cli.run_dir.shutil.disk_usage", lambda _: usage(2000, 0, 2000))
    told = refusals(images, tmp_path / "new" / "x.h5")
    assert told[0] == told[1]
    assert "Not enough disk space for the latent cache" in told[0]
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_to_all_ranks(images, tmp_path):
    (tmp_path / "file").write_text("no folder")
    told = refusals(images, tmp_path / "file" / "new" / "x.h5")
    assert told[0] == told[1]
    assert "Cannot write the latent cache under" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_is_being_written_is_refused_to_all_ranks(images, tmp_path):
    with stage.cache_lock(tmp_path / "x.h5") as lock:
        lock.take()
        told = refusals(images, tmp_path / "x.h5")
    assert told[0] == told[1]
    assert "is being written by process" in told[0]
    assert not (tmp_path / "x.h5").exists()
