"""Disks that are full, and that become full."""

import errno
import os
from collections import namedtuple

import pytest

from tests.caches import make_images, pixel_recipe
from xar_cli.cache import cache_latents, pipeline
from xar_cli.data.cache_file import CacheFile
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


def test_a_disk_that_fills_up_while_space_is_reserved_leaves_nothing(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="No space left"):
        make(images, tmp_path / "new" / "latents.h5")
    assert not list((tmp_path / "new").glob("*.h5"))
    assert not list((tmp_path / "new").glob(".*.tmp"))
