"""Disks that are full, and that become full."""

import errno
import os
from collections import namedtuple

import pytest
import torch

from tests.caches import N, make_cache, make_images, pixel_recipe
from xar_cli.cache import CacheSettings, cache_latents, pipeline
from xar_cli.cache.plan import make_plan
from xar_cli.cache.stage import _prepare, plan_cache
from xar_cli.data.cache_file import CacheFile
from xar_cli.data.latents import LatentReader
from xar_cli.errors import UserError

RECIPE = pixel_recipe("data.num_classes=3")


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def make(images, out):
    return cache_latents(images, out, RECIPE, device="cpu", batch_size=4)


def test_a_disk_that_becomes_full_ends_the_work_and_space_lets_it_go_on(images, tmp_path, monkeypatch):
    make(images, tmp_path / "whole.h5")
    monkeypatch.setattr(pipeline, "COMMIT_ROWS", 1)
    pwrite, calls = os.pwrite, []

    def full(descriptor, data, place):
        calls.append(1)
        if len(calls) > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, place)

    out = tmp_path / "latents.h5"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="No space left") as caught:
            make(images, out)
    assert caught.value.exit_code == 1
    assert 0 < (CacheFile(out).states == 1).sum() < 27
    make(images, out)
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_writes_that_come_in_pieces_are_whole(images, tmp_path, monkeypatch):
    make(images, tmp_path / "whole.h5")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: pwrite(descriptor, data[:50], place))
    make(images, tmp_path / "latents.h5")
    assert (tmp_path / "latents.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_disk_too_small_is_refused_with_both_figures(images, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("xar_cli.run_dir.shutil.disk_usage", lambda _: usage(0, 0, 2000))
    with pytest.raises(UserError, match=r"1\.1 MB needed, 2\.0 KB free") as caught:
        make(images, tmp_path / "new" / "latents.h5")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "new").exists()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Makes the disk as large as a given number of bytes; what lies beside the cache takes its space."""

    def set_size(size):
        def usage(_):
            used = sum(file.stat().st_size for file in (tmp_path / "new").glob("*") if file.is_file())
            return namedtuple("usage", "total used free")(size, used, size - used)

        monkeypatch.setattr("xar_cli.run_dir.shutil.disk_usage", usage)

    (tmp_path / "new").mkdir()
    return set_size


def test_what_a_killed_process_left_is_removed_and_needs_no_second_space(images, tmp_path, disk):
    out = tmp_path / "new" / "latents.h5"
    left = [".latents.h5.123.tmp", "latents.shard-00000-of-00002.h5", ".latents.shard-00001-of-00002.h5.123.tmp"]
    others = ["latents.old.h5", ".latents.old.h5.9.tmp", "latents.old.shard-00000-of-00002.h5", "latents.shard-1.h5"]
    for name in (*left, *others):
        (out.parent / name).write_bytes(bytes(500_000 if name in left else 1000))
    disk(2_000_000)
    make(images, out)
    assert sorted(file.name for file in out.parent.iterdir()) == sorted([*others, ".latents.h5.lock", "latents.h5"])
    make(images, out)
    assert sorted(file.name for file in out.parent.iterdir()) == sorted([*others, ".latents.h5.lock", "latents.h5"])


def test_the_parts_of_a_cache_whose_file_was_renamed_are_not_taken_for_leftovers(images, tmp_path):
    out, renamed = tmp_path / "latents.h5", tmp_path / "latents-old.h5"
    make_cache(out, num_shards=3)
    out.rename(renamed)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("latents*.h5")}
    settings = CacheSettings(images=images, out=out, config=RECIPE, device="cpu")
    for refused in (lambda: make(images, out), lambda: plan_cache(settings)):
        with pytest.raises(UserError, match=r"'.*latents\.shard-00000-of-00003\.h5' is a part of a latent cache"):
            refused()
    assert {file.name: file.read_bytes() for file in tmp_path.glob("latents*.h5")} == before
    assert LatentReader(renamed).num_samples == N


def test_one_row_done_or_a_part_that_is_cut_off_keeps_all_parts(images, tmp_path):
    out = tmp_path / "latents.h5"
    make_cache(out, num_shards=2, finish=False)
    first, second = CacheFile(out).shards
    empty = second.path.read_bytes()
    one_done = bytearray(empty)
    one_done[second.offsets["written"] + 3] = 1
    out.unlink()
    for content in (bytes(one_done), empty[: len(empty) // 2]):
        second.path.write_bytes(content)
        with pytest.raises(UserError, match="shard-00001-of-00002"):
            make(images, out)
        assert first.path.exists()
        assert second.path.read_bytes() == content
    second.path.write_bytes(empty)
    make(images, out)
    assert not first.path.exists()


def test_a_plan_beside_a_cache_that_is_being_made_does_not_count_its_space_twice(images, tmp_path, disk, monkeypatch):
    out, replace, plans = tmp_path / "new" / "latents.h5", os.replace, []
    settings = CacheSettings(images=images, out=out, config=RECIPE, device="cpu", batch_size=4)

    def plan_meanwhile(source, target):
        replace(source, target)
        if target.name != out.name:
            disk(0)
            plans.append(make_plan(settings, torch.device("cpu")))
            disk(10_000_000)

    disk(10_000_000)
    plan, job = make_plan(settings, torch.device("cpu"))
    monkeypatch.setattr(os, "replace", plan_meanwhile)
    _prepare(out, plan, job, num_shards=2)
    assert len(plans) == 2


def test_a_dry_run_sees_a_disk_too_small(images, tmp_path, disk):
    disk(2000)
    settings = CacheSettings(images=images, out=tmp_path / "new" / "latents.h5", config=RECIPE, device="cpu")
    with pytest.raises(UserError, match="Not enough disk space"):
        plan_cache(settings)


def test_a_disk_that_fills_up_while_space_is_reserved_leaves_nothing(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="No space left"):
        make(images, tmp_path / "new" / "latents.h5")
    assert not list((tmp_path / "new").glob("*.h5"))
    assert not list((tmp_path / "new").glob(".*.tmp"))
