"""Images on disk: written whole, by threads; grids."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from xar_cli.errors import UserError
from xar_cli.sample.images import PngWriter, grid_image, image_path, is_whole, load_images

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_pixels(tmp_path, channels):
    images = RNG.integers(0, 256, (40, channels, 8, 6), dtype=np.uint8)
    with closing(PngWriter(tmp_path, threads=2, backlog=3)) as writer:
        for index, image in enumerate(images):
            writer.write(index, image)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"{index:06d}.png" for index in range(40)]
    for index, image in enumerate(images):
        with Image.open(image_path(tmp_path, index)) as found:
            assert found.mode == ("L" if channels == 1 else "RGB")
            assert np.array_equal(np.asarray(found).reshape(8, 6, channels), image.transpose(1, 2, 0))


def test_a_torn_or_missing_or_empty_png_is_not_whole(tmp_path):
    with closing(PngWriter(tmp_path)) as writer:
        writer.write(0, np.zeros((1, 8, 8), np.uint8))
    path = image_path(tmp_path, 0)
    assert is_whole(path)
    data = path.read_bytes()
    for torn in (data[:-1], data[: len(data) // 2], b"", b"\x89PNG"):
        path.write_bytes(torn)
        assert not is_whole(path)
    assert not is_whole(image_path(tmp_path, 1))


@pytest.mark.parametrize("compress_level", [0, 1])
@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_one_wrong_byte_anywhere_is_damage(tmp_path, place, compress_level):
    """Uncompressed, a wrong byte is a wrong pixel of a picture that could be shown: its checksum tells."""
    image = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for index in range(4):
        image.save(image_path(tmp_path, index), compress_level=compress_level)
    data = bytearray(image_path(tmp_path, 1).read_bytes())
    data[int(place * len(data))] ^= 1
    for index in (1, 3):
        image_path(tmp_path, index).write_bytes(data)
    with pytest.raises(UserError, match=r"removed: 000001.png, 000003.png\.") as caught:
        list(load_images(tmp_path, range(4)))
    assert caught.value.exit_code == 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000000.png", "000002.png"]


def test_a_write_that_fails_is_raised_and_leaves_no_part_behind(tmp_path):
    folder = tmp_path / "gone"
    writer = PngWriter(folder)
    writer.write(0, np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(OSError, match="gone"):
        writer.close()
    assert not folder.exists()


def test_grid_places_images_row_after_row_and_enlarges_small_ones():
    images = [Image.new("L", (8, 8), value) for value in (10, 20, 30)]
    grid = grid_image(images, columns=2, gap=2)
    assert grid.size == (2 * 66 + 2, 2 * 66 + 2)
    centres = [grid.getpixel((x, y))[0] for x, y in ((34, 34), (100, 34), (34, 100), (100, 100))]
    assert centres == [10, 20, 30, 255]
