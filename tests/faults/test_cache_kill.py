"""A real process that makes a cache is killed again and again; nothing is lost, doubled or torn."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from tests.caches import make_images, pixel_recipe
from xar_cli.cache import cache_latents, pipeline
from xar_cli.cache.verify import verify_cache
from xar_cli.data.cache_file import CacheFile
from xar_cli.errors import UserError

NUM_IMAGES = 180
NUM_KILLS = 25
RECIPE = pixel_recipe("data.num_classes=3")


def make(images, out):
    """The work of the child: small batches, and a commit after each."""
    pipeline.COMMIT_ROWS = 1
    cache_latents(images, out, RECIPE, device="cpu", batch_size=4, workers=1)


@pytest.fixture(scope="module")
def context():
    """Children are forked from a server that has imported everything, so that they begin at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["xar_cli.cache.stage", "tests.caches"])
    return context


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("kill") / "images", 3, NUM_IMAGES // 3)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A cache made in one go."""
    out = tmp_path_factory.mktemp("whole") / "latents.h5"
    make(images, out)
    return out.read_bytes()


def start(context, images, out):
    child = context.Process(target=make, args=(images, out))
    child.start()
    return child


def count_done(out):
    return int((CacheFile(out).states == 1).sum()) if out.exists() else 0


def wait_for_progress(child, out, more_than):
    while child.is_alive() and count_done(out) <= more_than:
        time.sleep(0.001)


def test_killed_at_random_moments_the_cache_comes_out_the_same(context, images, whole, tmp_path):
    out = tmp_path / "latents.h5"
    for _ in range(2):  # how long does one take, once the server of the processes is up
        begin = time.monotonic()
        child = start(context, images, out)
        child.join()
        duration = time.monotonic() - begin
        assert out.read_bytes() == whole
        out.unlink()

    rng, kills, partly_done = np.random.default_rng(0), 0, set()
    while kills < NUM_KILLS:
        child = start(context, images, out)
        child.join(timeout=float(rng.uniform(0, duration)))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        done = count_done(out)
        if 0 < done < NUM_IMAGES:
            partly_done.add(done)
            assert verify_cache(out).checksum_errors == 0
        if child.exitcode == 0:
            assert out.read_bytes() == whole
            out.unlink()
    assert len(partly_done) >= 3  # the kills fell into the work, not beside it
    child = start(context, images, out)
    child.join()
    assert out.read_bytes() == whole


def test_a_kill_leaves_no_lock_and_a_living_job_keeps_others_out(context, images, tmp_path):
    out = tmp_path / "latents.h5"
    child = start(context, images, out)
    wait_for_progress(child, out, 0)
    os.kill(child.pid, signal.SIGSTOP)  # it lives, and cannot finish
    try:
        with pytest.raises(UserError, match=f"is being written by process {child.pid} on "):
            make(images, out)
    finally:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    make(images, out)
    assert count_done(out) == NUM_IMAGES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_stop_keeps_what_was_made(context, images, whole, tmp_path, number):
    out = tmp_path / "latents.h5"
    child = start(context, images, out)
    wait_for_progress(child, out, 8)
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == (143 if number == signal.SIGTERM else 1)
    assert 8 < count_done(out) < NUM_IMAGES
    make(images, out)
    assert out.read_bytes() == whole
