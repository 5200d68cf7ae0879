"""Every kind of input, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.unit.evaluate.conftest import make_images, write_folder
from xar_cli.data import images as data_images
from xar_cli.data.images import BadImageError, ImageFolder
from xar_cli.errors import UserError
from xar_cli.evaluate.images import ArrayImages, FolderImages, GeneratedImages, decode_opaque, open_images
from xar_cli.evaluate.npz import StoredRows, read_npz
from xar_cli.evaluate.reference import open_reference

IMAGES = make_images(5, size=16)


def test_folder_npz_and_hdf5_give_the_same_images(tmp_path) -> None:
    folder = write_folder(tmp_path / "folder", IMAGES)
    np.savez(tmp_path / "batch.npz", IMAGES)
    with h5py.File(tmp_path / "batch.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, np.arange(5)
    sources = [open_images(tmp_path / name) for name in ("folder", "batch.npz", "batch.h5")]
    for source in sources:
        assert len(source) == 5
        np.testing.assert_array_equal(np.stack([source.load(index) for index in range(5)]), IMAGES)
    assert sources[1].content_hash() == sources[2].content_hash()
    assert sources[2].labels is not None
    assert sources[2].labels.tolist() == [0, 1, 2, 3, 4]
    assert open_images(folder).content_hash() == sources[0].content_hash()


def test_content_hash_sees_every_byte_and_name(tmp_path) -> None:
    folder = write_folder(tmp_path / "a", IMAGES)
    before = open_images(folder)
    first, print_before = before.content_hash(), before.fingerprint()
    assert open_images(write_folder(tmp_path / "b", IMAGES)).content_hash() == first  # wherever they lie
    (folder / "000004.png").rename(folder / "000009.png")
    assert open_images(folder).content_hash() != first
    assert open_images(folder).fingerprint() != print_before
    assert open_images(folder, image_size=8).content_hash() != open_images(folder).content_hash()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_replaced_by_one_of_its_size_and_time_is_another(tmp_path, in_place) -> None:
    """As `tar`, `rsync` and `cp -p` leave them."""
    images = FolderImages(write_folder(tmp_path / "set", make_images(2), ".bmp"))
    fingerprint, path = images.fingerprint(), images.files[1]
    assert images.fingerprint() == fingerprint
    before, new = path.stat(), tmp_path / "set" / path.name if in_place else tmp_path / "new.bmp"
    while True:
        Image.fromarray(make_images(1, seed=9)[0]).save(new)
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        if new.stat().st_ctime_ns != before.st_ctime_ns:  # the system's clock has steps
            break
    new.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert images.fingerprint() != fingerprint


def test_files_are_in_the_order_of_the_libraries(tmp_path) -> None:
    """Both sort whole paths as text: '-' comes before '/', which sorting by path components would not give."""
    from torch_fidelity.utils import glob_samples_paths

    for name in ("a/1.png", "a-b/1.png", "a/0.JPG", "B/2.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(IMAGES[0]).save(tmp_path / name)
    ours = [str(path) for path in open_images(tmp_path).files]
    assert ours == glob_samples_paths(str(tmp_path), True, "png,jpg,jpeg", verbose=False)
    assert [path.removeprefix(f"{tmp_path}/") for path in ours] == ["B/2.jpeg", "a-b/1.png", "a/0.JPG", "a/1.png"]


def test_labels_come_from_subfolders(tmp_path) -> None:
    for index, name in enumerate(("cat", "ant", "cat")):
        write_folder(tmp_path / name / f"part{index}", IMAGES[index : index + 1])
    opened = open_images(tmp_path)
    assert opened.class_names == ["ant", "cat"]
    assert opened.labels.tolist() == [0, 1, 1]
    assert opened.class_name(1) == "cat"


def test_a_folder_holds_what_a_latent_cache_of_it_holds(tmp_path) -> None:
    """Links to class folders are followed, and all kinds of image count."""
    write_folder(tmp_path / "elsewhere", IMAGES[:2])
    root = tmp_path / "root"
    write_folder(root / "ant", IMAGES[2:4], ".webp")
    (root / "bee").symlink_to(tmp_path / "elsewhere")
    (root / "notes").mkdir()  # a cache refuses a class without images; here it changes nothing
    opened = open_images(root)
    (root / "notes").rmdir()
    cached = ImageFolder(root)
    assert [str(path.relative_to(root)) for path in opened.files] == cached.names
    assert opened.class_names == list(cached.class_names)
    assert opened.labels.tolist() == cached.labels.tolist() == [0, 0, 1, 1]


def test_images_beside_class_folders_count_and_take_the_classes_away(tmp_path, caplog) -> None:
    """As both libraries count them; a preview in a subfolder must not be judged in place of the samples."""
    write_folder(tmp_path, IMAGES[:4])
    write_folder(tmp_path / "grid", IMAGES[4:5])
    opened = open_images(tmp_path)
    assert (len(opened), opened.labels, opened.class_names) == (5, None, None)
    assert "4 images lie beside the folders" in caplog.text


def test_packed_samples_keep_their_manifest(tmp_path) -> None:
    """In the HDF5 file as an attribute, and beside an .npz with the same labels."""
    manifest = {"format": "xar-samples", "recipe": "tiny", "class_names": list("abcdefghij")}
    with h5py.File(tmp_path / "samples.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, np.arange(5)
        file.attrs["manifest"] = json.dumps(manifest)
    np.savez(tmp_path / "samples.npz", IMAGES, np.arange(5))
    np.savez(tmp_path / "other.npz", IMAGES, np.arange(5)[::-1])
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "labels": [*range(5), 9]}))  # grown since
    for name in ("samples.h5", "samples.npz"):
        opened = open_images(tmp_path / name)
        assert opened.manifest["recipe"] == "tiny"
        assert opened.class_name(2) == "c"
    assert open_images(tmp_path / "other.npz").manifest is None
    with h5py.File(tmp_path / "samples.h5", "a") as file:
        file.attrs["manifest"] = "what another program says"
    assert open_images(tmp_path / "samples.h5").manifest is None


def test_labels_of_a_model_without_classes_are_none(tmp_path) -> None:
    manifest = {"format": "xar-samples", "labels": [0] * 5, "config": {"data": {"num_classes": 0}}}
    folder = write_folder(tmp_path / "folder", IMAGES)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    np.savez(folder / "samples.npz", IMAGES, np.zeros(5, int))
    generated = GeneratedImages("a model", np.zeros(5, int), lambda indices: IMAGES[list(indices)], "s", None, manifest)
    for images in (open_images(folder), open_images(folder / "samples.npz"), generated):
        assert images.labels is None
        assert len(images) == 5


@pytest.mark.parametrize("key", ["labels", "class_names", "config", "evaluations"])
def test_a_damaged_manifest_is_a_sentence(tmp_path, key) -> None:
    folder = write_folder(tmp_path / "folder", IMAGES)
    (folder / "manifest.json").write_text(json.dumps({"format": "xar-samples", key: "text"}))
    with pytest.raises(UserError, match=f"'{key}' is no"):
        open_images(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("config", {"data": [1]}), ("image_size", "x"), ("image_size", [8]), ("image_size", [8, True])]
)
def test_a_damaged_entry_of_a_manifest_is_a_sentence(tmp_path, key, value) -> None:
    folder = write_folder(tmp_path / "folder", IMAGES)
    (folder / "manifest.json").write_text(json.dumps({"format": "xar-samples", "labels": [0] * 5, key: value}))
    with pytest.raises(UserError, match=f"'{key}' is not as it was written"):
        open_images(folder)


def test_a_manifest_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch) -> None:
    folder = write_folder(tmp_path / "folder", IMAGES)
    np.savez(folder / "samples.npz", IMAGES, np.zeros(5, int))
    (folder / "manifest.json").write_text("{}")

    def refuse(_) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    for name in ("", "samples.npz"):
        with pytest.raises(UserError, match=r"manifest.json' cannot be read: Permission denied"):
            open_images(folder / name)


def test_damaged_rows_of_an_hdf5_file_are_bad_images(tmp_path) -> None:
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=IMAGES, chunks=(1, *IMAGES.shape[1:]), compression="gzip", fletcher32=True)
        place = file["images"].id.get_chunk_info(2).byte_offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(20))
    images = open_images(path)
    assert (images.load(1) == IMAGES[1]).all()
    for read in (lambda: images.load(2), images.content_hash):
        with pytest.raises(BadImageError, match=r"images\.h5': Can't .*read data"):
            read()


def test_labels_of_a_manifest_go_with_the_number_in_the_name(tmp_path) -> None:
    folder = write_folder(tmp_path / "samples", IMAGES)
    (folder / "000001.png").unlink()  # a stopped run: labels must not move up
    Image.fromarray(IMAGES[0]).save(folder / "grid.png")  # no sample
    manifest = {"format": "xar-samples", "labels": [5, 6, 7, 8, 9], "class_names": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    opened = open_images(folder)
    assert opened.labels.tolist() == [5, 7, 8, 9]
    assert opened.class_name(7) == "7"
    manifest["labels"] = [1, 2]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="knows only 2"):
        open_images(folder)


def test_a_sample_that_is_there_twice_is_refused(tmp_path) -> None:
    folder = write_folder(tmp_path / "samples", IMAGES)
    Image.fromarray(IMAGES[0]).save(folder / "3.png")
    assert len(open_images(folder)) == 6  # nothing says that they are numbers
    (folder / "manifest.json").write_text(json.dumps({"format": "xar-samples"}))
    with pytest.raises(UserError, match=r"holds image 3 twice: 000003\.png and 3\.png"):
        open_images(folder)


@pytest.mark.parametrize(("count", "warned"), [(5, False), (40, True)])
def test_samples_that_are_not_all_there_are_a_warning(tmp_path, caplog, count, warned) -> None:
    folder = write_folder(tmp_path / "samples", IMAGES)
    (folder / "manifest.json").write_text(json.dumps({"format": "xar-samples", "count": count}))
    assert len(open_images(folder)) == 5
    assert ("holds 5 of the 40 images" in caplog.text) == warned


def test_grey_is_repeated_and_opaque_alpha_dropped(tmp_path) -> None:
    grey = IMAGES[0, :, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    alpha = np.concatenate([IMAGES[0], np.full((16, 16, 1), 255, np.uint8)], axis=2)
    Image.fromarray(alpha).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(decode_opaque(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(decode_opaque(tmp_path / "opaque.png"), IMAGES[0])
    np.testing.assert_array_equal(ArrayImages(grey[None], "x").load(0), decode_opaque(tmp_path / "grey.png"))


def png_of_16_bits(image: np.ndarray) -> bytes:
    """An (H, W, 3) image as a PNG of 16 bits a channel, which Pillow reads and does not write."""
    height, width, _ = image.shape
    rows = (image.astype(">u2") * 257).reshape(height, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_of_16_bits(image: np.ndarray) -> bytes:
    """An (H, W, 3) image as a TIFF of 16 bits a channel, which Pillow reads and does not write."""
    height, width, _ = image.shape
    data = (image.astype("<u2") * 257).tobytes()
    count, longs = 9, {256: width, 257: height, 273: 0, 278: height, 279: len(data)}
    bits_at = 8 + 2 + 12 * count + 4
    values = {**longs, 258: bits_at, 259: 1, 262: 2, 273: bits_at + 6, 277: 3}
    entries = (
        struct.pack("<2H2I", tag, 4 if tag in longs else 3, 3 if tag == 258 else 1, value)
        for tag, value in sorted(values.items())
    )
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", count) + b"".join(entries) + bytes(4)
    return head + struct.pack("<3H", 16, 16, 16) + data


def test_transparent_deep_and_damaged_files_are_refused_by_name(tmp_path) -> None:
    alpha = np.concatenate([IMAGES[0], np.full((16, 16, 1), 128, np.uint8)], axis=2)
    Image.fromarray(alpha).save(tmp_path / "glass.png")
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "colours.png").write_bytes(png_of_16_bits(IMAGES[0]))
    (tmp_path / "colours.ppm").write_bytes(b"P6 # 1 2 3\n16 16\n65535\n" + IMAGES[0].astype(">u2").tobytes())
    (tmp_path / "colours.tif").write_bytes(tiff_of_16_bits(IMAGES[0]))
    whole = write_folder(tmp_path / "whole", IMAGES[:1]) / "000000.png"
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "text.png").write_text("not an image")
    for name, why in (
        ("glass.png", "transparent"),
        ("deep.png", "8 bits"),
        ("colours.png", "8 bits"),
        ("colours.ppm", "8 bits"),
        ("colours.tif", "8 bits"),
        ("cut.png", ""),
        ("text.png", "not an image"),
    ):
        with pytest.raises(BadImageError, match=f"{name}.*{why}"):
            decode_opaque(tmp_path / name)


@pytest.mark.parametrize(("suffix", "options"), [("ppm", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})])
def test_tiff_and_pnm_of_8_bits_are_taken_as_they_are(tmp_path, suffix, options) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / f"x.{suffix}", **options)
    np.testing.assert_array_equal(decode_opaque(tmp_path / f"x.{suffix}"), IMAGES[0])


def test_lack_of_memory_while_hashing_is_a_sentence(tmp_path, monkeypatch) -> None:
    def fail(*_):
        raise MemoryError

    images = open_images(write_folder(tmp_path / "folder", IMAGES))
    monkeypatch.setattr(data_images, "open", fail, raising=False)
    with pytest.raises(UserError, match="the memory does not suffice") as caught:
        images.content_hash()
    assert not isinstance(caught.value, BadImageError)


@pytest.mark.parametrize("image_size", [None, 8])
def test_what_is_no_regular_file_is_a_bad_image_and_a_folder_is_none(tmp_path, image_size) -> None:
    """Reading a pipe would wait for ever for somebody who writes into it."""
    write_folder(tmp_path / "album.png", IMAGES[:1])
    (tmp_path / "album.png" / "dangling.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "album.png" / "pipe.png")
    images = open_images(tmp_path, image_size)
    assert [path.name for path in images.files] == ["000000.png", "dangling.png", "pipe.png"]
    first = images.content_hash(), images.fingerprint()
    for index, why in ((1, "No such file"), (2, "no regular file")):
        with pytest.raises(BadImageError, match=why):
            images.load(index)
    Image.fromarray(IMAGES[1]).save(tmp_path / "album.png" / "nowhere", "PNG")  # what was missing comes back
    assert images.content_hash() != first[0]
    assert images.fingerprint() != first[1]
    assert images.load(1).shape[2] == 3


def test_crop_takes_photographs_of_any_shape(tmp_path) -> None:
    Image.fromarray(make_images(1, size=64)[0][:40]).save(tmp_path / "wide.png")
    assert open_images(tmp_path, image_size=16).load(0).shape == (16, 16, 3)
    assert open_images(tmp_path).load(0).shape == (40, 64, 3)


@pytest.mark.parametrize("name", ["batch.npz", "batch.h5"])
@pytest.mark.parametrize("opened", [open_images, open_reference])
def test_arrays_have_the_size_that_is_asked_for(tmp_path, name, opened) -> None:
    """They are not cropped, and were taken at their own size in silence."""
    np.savez(tmp_path / "batch.npz", IMAGES[:, :8])
    with h5py.File(tmp_path / "batch.h5", "w") as file:
        file["images"] = IMAGES[:, :8]
    opened(tmp_path / name, image_size=(8, 16))
    with pytest.raises(UserError, match="have 8 x 16 pixels, and --image-size 16 x 16 crops files alone"):
        opened(tmp_path / name, image_size=16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "absent", "nothing at"),
        (lambda path: path, "holds no image"),
        (lambda path: _text(path / "notes.txt"), "neither a folder"),
        (lambda path: _text(path / "broken.npz"), "cannot be read as an .npz"),
        (lambda path: _text(path / "broken.h5"), "cannot be read as an HDF5"),
        (lambda path: _npz(path, mu=np.zeros(3)), "holds no images"),
        (lambda path: _npz(path, arr_0=np.zeros((0, 8, 8, 3), np.uint8), arr_1=[]), "file.npz' holds no image"),
        (lambda path: _npz(path, arr_0=np.zeros((2, 8, 8, 3))), "type float64"),
        (lambda path: _npz(path, arr_0=np.zeros((2, 3, 8, 8), np.uint8)), "shape"),
        (lambda path: _npz(path, arr_0=np.zeros((2, 0, 8, 3), np.uint8)), "shape"),
        (lambda path: _npz(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros(3, int)), "3 labels"),
    ],
)
def test_what_is_no_image_set_is_refused(tmp_path, make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_images(make(tmp_path))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 0, 1], "some are negative"),
        (np.array([2**63] * 5, np.uint64), "some are negative"),
        (np.eye(5, dtype=int), r"shape is \(5, 5\)"),
        (list("abcde"), "no integers"),
        (np.arange(5) + 0.5, r"no integers \(type float64\)"),
        (3, r"shape is \(\)"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(tmp_path, labels, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "xar-samples", "labels": [0]}))
    with pytest.raises(UserError, match=f"labels in .*file.npz' are wrong: .*{message}"):
        open_images(_npz(tmp_path, arr_0=IMAGES, arr_1=labels))
    assert open_reference(tmp_path / "file.npz").images is not None  # which reads no labels
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, labels
    with pytest.raises(UserError, match=r"labels in .*file.h5' are wrong"):
        open_images(tmp_path / "file.h5")


@pytest.mark.parametrize("labels", [["a"] * 5, [None] * 5, [[0], [1, 2], 0, 0, 0], [0, 1, 2, 0, 1], [0.5] * 5])
def test_labels_of_a_manifest_that_are_no_class_numbers_are_refused(tmp_path, labels) -> None:
    """Those of classes without a name are none either."""
    manifest = json.dumps({"format": "xar-samples", "labels": labels, "class_names": ["ant", "bee"]})
    folder = write_folder(tmp_path / "samples", IMAGES)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"labels in .*samples/manifest.json' are wrong"):
        open_images(folder)


def test_packed_labels_without_a_class_name_are_refused(tmp_path) -> None:
    with h5py.File(tmp_path / "samples.h5", "w") as file:
        file["images"], file["labels"] = IMAGES, np.arange(5)
        file.attrs["manifest"] = json.dumps({"format": "xar-samples", "class_names": list("abcd")})
    with pytest.raises(UserError, match="4 is among them, and only 4 classes have names"):
        open_images(tmp_path / "samples.h5")


@pytest.mark.parametrize("name", ["images", "labels"])
def test_an_hdf5_group_in_place_of_an_array_is_refused(tmp_path, name) -> None:
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.create_group(name)
        if name == "labels":
            file["images"] = IMAGES
    with pytest.raises(UserError, match="no dataset"):
        open_images(tmp_path / "file.h5")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz_stay_on_the_disk_unless_they_are_compressed(tmp_path, save, order) -> None:
    images, labels = make_images(7), np.arange(7)
    save(tmp_path / "batch.npz", np.asarray(images, order=order), labels)
    found = open_images(tmp_path / "batch.npz")
    assert isinstance(found.images, StoredRows) == (save is np.savez and order == "C")
    np.testing.assert_array_equal(np.stack(found.load_many(range(7))), images)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.content_hash() == ArrayImages(images, "x").content_hash()


def test_the_outline_of_arrays_tells_copies_from_others(tmp_path) -> None:
    images, others = make_images(40), make_images(40, seed=1)
    np.savez(tmp_path / "batch.npz", images)
    outline = ArrayImages(images, "here").outline()
    assert open_images(tmp_path / "batch.npz").outline() == outline
    assert ArrayImages(others, "there").outline() != outline
    assert ArrayImages(images[:39], "cut").outline() != outline


def test_damaged_pixels_of_an_npz_are_refused_when_it_is_opened(tmp_path) -> None:
    path = tmp_path / "batch.npz"
    np.savez(path, make_images(7))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read as an \.npz file"):
        open_images(path)


def test_an_npz_that_is_cut_off_while_it_is_read_is_no_bad_image(tmp_path) -> None:
    path = tmp_path / "batch.npz"
    np.savez(path, make_images(7))
    found = open_images(path)
    os.truncate(path, 5000)
    assert found.load(0).shape == (32, 32, 3)
    for read in (lambda: found.load(6), found.content_hash):
        with pytest.raises(UserError, match="has become shorter") as caught:
            read()
        assert not isinstance(caught.value, BadImageError)


def test_npz_with_python_objects_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        read_npz(tmp_path / "objects.npz")


def test_generated_images_are_drawn_in_one_batch() -> None:
    asked: list[list[int]] = []

    def draw(indices):
        asked.append(list(indices))
        return IMAGES[list(indices)]

    images = GeneratedImages("model", np.array([0, 1, 0, 1, 0]), draw, "seed 0")
    assert len(images.load_many([1, 3])) == 2
    assert asked == [[1, 3]]
    assert images.content_hash() != GeneratedImages("model", images.labels, draw, "seed 1").content_hash()


def _text(path):
    path.write_text("hello")
    return path


def _npz(folder, **arrays):
    np.savez(folder / "file.npz", **arrays)
    return folder / "file.npz"


@pytest.mark.parametrize("image_size", [None, 8])
def test_a_machine_that_cannot_read_promises_nothing_that_is_stored(tmp_path, monkeypatch, image_size) -> None:
    def fail(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    images = open_images(write_folder(tmp_path / "folder", IMAGES), image_size)
    monkeypatch.setattr(data_images, "open", fail, raising=False)
    with pytest.raises(UserError, match="Stale file handle") as caught:
        images.load(0)
    assert not isinstance(caught.value, BadImageError)
    assert caught.value.next_step == "That is the machine, not the file: mend it, and give the same command again."
    with pytest.raises(UserError, match="Stale file handle"):
        images.content_hash()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, os.strerror(errno.EMFILE))])
def test_lack_of_memory_or_files_while_decoding_is_no_bad_image(tmp_path, monkeypatch, error) -> None:
    """--skip-bad would leave out what is sound."""

    def fail(*_):
        raise error

    path = write_folder(tmp_path / "folder", IMAGES) / "000000.png"
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"Reading .* failed") as caught:
        decode_opaque(path)
    assert not isinstance(caught.value, BadImageError)
    assert caught.value.exit_code == 1
