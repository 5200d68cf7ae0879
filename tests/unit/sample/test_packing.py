"""Waiting for the images of other processes, and files that take their place when they are whole."""

from __future__ import annotations

from contextlib import closing

import h5py
import numpy as np
import pytest

from xar_cli.errors import UserError
from xar_cli.sample import packing
from xar_cli.sample.images import PngWriter, image_path
from xar_cli.sample.packing import pack_is_current, pack_path, patience_for, wait_for_images, write_pack

IMAGE = np.zeros((1, 4, 4), np.uint8)
MANIFEST = {"count": 3, "image_size": 4, "image_channels": 1, "labels": [2, 0, 1]}


def write(folder, *indices):
    with closing(PngWriter(folder)) as writer:
        for index in indices:
            writer.write(index, IMAGE + index)


def test_waits_until_the_last_image_is_whole(tmp_path):
    write(tmp_path, 0)
    pauses: list[float] = []

    def sleep(seconds):
        pauses.append(seconds)
        write(tmp_path, len(pauses))

    wait_for_images(tmp_path, 4, sleep, patience=2)
    assert len(pauses) == 3


def test_gives_up_when_no_image_comes_any_more(tmp_path):
    write(tmp_path, 0)
    with pytest.raises(UserError, match="2 images of other processes are missing") as caught:
        wait_for_images(tmp_path, 3, lambda seconds: None, patience=5)
    assert caught.value.exit_code == 1


def test_patience_grows_with_the_time_of_a_batch():
    """A batch of the recipe `base` takes a quarter of an hour on two cores."""
    assert patience_for(0) == patience_for(100) == 600
    assert patience_for(900) == 4500


@pytest.mark.parametrize("pack", ["npz", "hdf5"])
def test_a_packed_file_is_current_where_its_count_is(tmp_path, pack):
    write(tmp_path, 0, 1, 2)
    assert not pack_is_current(tmp_path, MANIFEST, pack)
    path = write_pack(tmp_path, MANIFEST, pack)
    assert pack_is_current(tmp_path, MANIFEST, pack)
    assert not pack_is_current(tmp_path, {**MANIFEST, "count": 4}, pack)
    for damaged in (b"", b"PK\x03\x04", path.read_bytes()[:200]):
        path.write_bytes(damaged)
        assert not pack_is_current(tmp_path, MANIFEST, pack)


def test_oblong_images_are_packed_as_rows_and_columns(tmp_path):
    images = np.arange(3 * 2 * 5, dtype=np.uint8).reshape(3, 1, 2, 5)
    with closing(PngWriter(tmp_path)) as writer:
        for index, image in enumerate(images):
            writer.write(index, image)
    manifest = {**MANIFEST, "image_size": [2, 5]}
    with np.load(write_pack(tmp_path, manifest, "npz")) as packed:
        assert np.array_equal(packed["arr_0"], images.transpose(0, 2, 3, 1).repeat(3, axis=-1))
    with h5py.File(write_pack(tmp_path, manifest, "hdf5")) as file:
        assert np.array_equal(file["images"][:], images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("pack", ["npz", "hdf5"])
def test_a_full_disk_leaves_no_part_of_a_packed_file(tmp_path, monkeypatch, pack):
    write(tmp_path, 0, 1, 2)
    before = write_pack(tmp_path, MANIFEST, pack).read_bytes()

    def torn(folder, manifest):
        yield np.zeros((4, 4, 1), np.uint8)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "_read_images", torn)
    with pytest.raises(OSError, match="No space left"):
        write_pack(tmp_path, MANIFEST, pack)
    assert pack_path(tmp_path, pack).read_bytes() == before
    expected = {image_path(tmp_path, index).name for index in range(3)} | {pack_path(tmp_path, pack).name}
    assert {path.name for path in tmp_path.iterdir()} == expected
