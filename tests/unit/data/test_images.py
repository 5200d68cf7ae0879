"""Folders, decoding and the crop."""

import os

import numpy as np
import pytest
from PIL import Image

from xar_cli.data.images import BadImageError, ImageFolder, load_image
from xar_cli.errors import UserError


def save(path, size=(10, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def test_classes_and_files_come_sorted_and_nested(tmp_path):
    for name in (
        "b/2.png",
        "b/1.PNG",
        "a/deep/er/x.jpg",
        "a/z.webp",
        "a/notes.txt",
        "a/.hidden.png",
        ".git/y.png",
    ):
        save(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("x")
    folder = ImageFolder(tmp_path)
    assert folder.class_names == ("a", "b")
    assert folder.names == ["a/deep/er/x.jpg", "a/z.webp", "b/1.PNG", "b/2.png"]
    assert folder.labels.tolist() == [0, 0, 1, 1]
    assert folder.labels.dtype == np.int64


def test_files_of_every_pnm_kind_are_found_and_read(tmp_path):
    for name, mode in (("a.pbm", "1"), ("b.pgm", "L"), ("c.pnm", "L"), ("d.ppm", "RGB")):
        save(tmp_path / name, mode=mode)
    folder = ImageFolder(tmp_path)
    assert folder.names == ["a.pbm", "b.pgm", "c.pnm", "d.ppm"]
    assert [folder.load(i, 8, 3).shape for i in range(4)] == [(3, 8, 8)] * 4


def test_images_without_class_folders_have_no_classes(tmp_path):
    save(tmp_path / "b.png"), save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path)
    assert (folder.class_names, folder.names, folder.labels.tolist()) == ((), ["a.png", "b.png"], [0, 0])


def test_links_to_folders_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path / "root").names == ["cat/x.png"]


def test_a_link_that_leads_back_is_refused(tmp_path):
    save(tmp_path / "cat" / "x.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads back"):
        ImageFolder(tmp_path)


def test_a_link_to_itself_is_refused(tmp_path):
    save(tmp_path / "cat" / "x.png")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat" / "loop")
    with pytest.raises(UserError, match="cat/loop"):
        ImageFolder(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        ImageFolder(tmp_path / "nothing")
    with pytest.raises(UserError, match="no images"):
        ImageFolder(tmp_path)
    save(tmp_path / "cat" / "x.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="'dog'"):
        ImageFolder(tmp_path)


def test_names_that_are_not_utf8_are_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/c\xff"
    os.mkdir(folder)
    save(tmp_path / "x.png").rename(os.fsdecode(folder + b"/\xfe.png"))
    source = ImageFolder(tmp_path)
    assert os.fsencode(source.names[0]) == b"c\xff/\xfe.png"
    assert source.load(0, 4, 3).shape == (3, 4, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_the_right_size_are_untouched(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3) if channels == 3 else (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    loaded = load_image(tmp_path / "x.png", 8, channels)
    assert loaded.dtype == np.uint8
    assert np.array_equal(loaded, pixels.transpose(2, 0, 1) if channels == 3 else pixels[None])


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImageError, match="No such file"):
        load_image(tmp_path / "x.png", 8)
