"""What rows are made from: MAR's cache, archives, a tokenizer of one's own."""

import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.caches import make_images, pixel_recipe
from xar_cli.cache import cache_latents
from xar_cli.cache.jobs import ConvertMar, EncodeImages, open_images
from xar_cli.config import load_recipe
from xar_cli.data.images import BadImageError
from xar_cli.data.latents import LatentReader
from xar_cli.errors import UserError
from xar_cli.tokenizer import Codec

BASE = load_recipe("base", ["data.num_classes=2"])
SHAPE = (32, 16, 16)


@pytest.fixture
def mar(tmp_path):
    """A cache as MAR writes it: two classes of three files."""
    rng = np.random.default_rng(0)
    stored = {}
    for folder in ("n01440764", "n01443537"):
        (tmp_path / "mar" / folder).mkdir(parents=True)
        for i in range(3):
            name = f"{folder}/{folder}_{i}.JPEG.npz"
            stored[name] = rng.standard_normal((2, *SHAPE)).astype(np.float32)
            np.savez(tmp_path / "mar" / name, moments=stored[name][0], moments_flip=stored[name][1])
    return tmp_path / "mar", stored


def test_mars_cache_is_taken_over_without_encoding(mar, tmp_path):
    root, stored = mar
    summary = cache_latents(root, tmp_path / "x.h5", BASE, device="cpu", from_mar=True, dtype="float32")
    assert summary.num_samples == 6
    reader = LatentReader(tmp_path / "x.h5")
    mirrored = np.array([False, True, False, True, False, True])
    moments, labels = reader.read(np.arange(6), mirrored)
    expected = [values[int(mirror)] for values, mirror in zip(stored.values(), mirrored, strict=True)]
    assert np.array_equal(moments, np.stack(expected))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert reader.class_names == ("n01440764", "n01443537")
    assert reader.class_titles == ("tench", "goldfish")
    assert reader.tokenizer == "kl16:mar"
    reader.check_matches(BASE)


def test_without_flip_only_the_images_are_taken(mar):
    job = ConvertMar(mar[0], SHAPE, flip=False)
    assert job.load(0).shape == (1, *SHAPE)


def test_a_damaged_file_of_mar_is_bad(mar, tmp_path):
    root, _ = mar
    path = root / "n01443537" / "n01443537_1.JPEG.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="n01443537_1") as caught:
        cache_latents(root, tmp_path / "x.h5", BASE, device="cpu", from_mar=True)
    assert caught.value.exit_code == 1
    assert cache_latents(root, tmp_path / "x.h5", BASE, device="cpu", from_mar=True, max_bad=1).num_bad == 1


def test_a_file_of_mar_with_nan_is_bad_and_not_the_tokenizer(mar, tmp_path):
    root, _ = mar
    for name in ("moments", "moments_flip"):
        values = {key: np.zeros(SHAPE, np.float32) for key in ("moments", "moments_flip")}
        values[name][3, 4, 5] = np.nan
        np.savez(root / "n01443537" / "n01443537_1.JPEG.npz", **values)
        with pytest.raises(UserError, match=r"n01443537_1.*not finite"):
            cache_latents(root, tmp_path / "x.h5", BASE, device="cpu", from_mar=True)
    assert cache_latents(root, tmp_path / "x.h5", BASE, device="cpu", from_mar=True, max_bad=1).num_bad == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_cache_of_mar_may_begin_with_a_damaged_file(mar, tmp_path, method):
    root, stored = mar
    path = root / next(iter(stored))
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("moments.npy", bytes(1000))
    data = bytearray(path.read_bytes())
    data[45:55] = b"\xff" * 10  # where the compressed data begins
    path.write_bytes(data)
    summary = cache_latents(root, tmp_path / "x.h5", BASE, device="cpu", from_mar=True, max_bad=None)
    assert (summary.num_samples, summary.num_bad) == (5, 1)


def test_threads_read_headers_one_at_a_time(mar, monkeypatch):
    job, real, inside, most = ConvertMar(mar[0], SHAPE, flip=True), np.lib.format.read_array_header_1_0, [], []

    def read_header(file):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return real(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", read_header)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(job.load, range(6)))
    assert max(most) == 1
    assert np.array_equal(np.stack(loaded), np.stack(list(mar[1].values())))


def test_a_header_that_is_no_python_is_a_bad_file_of_mar(mar):
    root, stored = mar
    path = root / next(iter(stored))
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b"{'descr': '<f4', 'fortran_order': False", b"{'descr': '<f4', 'fortran_order': (((((")
    )
    job = ConvertMar(root, SHAPE, flip=True)
    with pytest.raises(BadImageError):
        job.load(0)


def test_what_is_no_cache_of_mar_is_refused(mar, tmp_path):
    with pytest.raises(UserError, match="fits the recipe"):
        ConvertMar(mar[0], (32, 32, 32), flip=True)
    for name in mar[1]:
        np.savez(mar[0] / name, other=np.zeros(3))
    with pytest.raises(UserError, match=r"no item named 'moments\.npy'"):
        ConvertMar(mar[0], SHAPE, flip=True)
    with pytest.raises(UserError, match="no files of MAR's cache"):
        ConvertMar(make_images(tmp_path / "images"), SHAPE, flip=True)


def test_a_recipe_without_kl16_is_refused(mar, tmp_path):
    with pytest.raises(UserError, match="kl16"):
        cache_latents(mar[0], tmp_path / "x.h5", pixel_recipe(), device="cpu", from_mar=True)


def test_kl16_without_weights_says_where_they_are(tmp_path):
    with pytest.raises(UserError, match=r"kl16\.ckpt"):
        cache_latents(make_images(tmp_path / "images", 2), tmp_path / "x.h5", BASE, device="cpu")
    assert not (tmp_path / "x.h5").exists()


class OddTokenizer:
    """Its mirror images are no mirrored moments, and every call is remembered."""

    kind, stride, image_channels, latent_channels, identity = "odd", 4, 1, 1, "odd/1"

    def encode(self, images):
        mean = images[:, :, ::4, ::4]
        return torch.cat([mean, mean - 1], dim=1)


def test_images_and_mirror_images_both_go_through_the_tokenizer(tmp_path):
    source = open_images(make_images(tmp_path / "images", 1, 2))
    job = EncodeImages(source, Codec(OddTokenizer(), 1.0), 8, True, torch.device("cpu"))
    items = np.stack([job.load(0), job.load(1)])
    image, mirror = job.encode(items)
    pixels = items.astype(np.float32) / 127.5 - 1
    assert np.allclose(image[:, 0], pixels[:, 0, ::4, ::4], atol=1e-6)
    assert np.allclose(mirror[:, 0], pixels[:, 0, ::4, ::-1][..., ::4], atol=1e-6)
    assert np.allclose(mirror[:, 1], mirror[:, 0] - 1)


def test_an_archive_is_cached_like_its_folder(tmp_path):
    import shutil

    images = make_images(tmp_path / "images", 3, 4)
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", images)
    recipe = pixel_recipe("data.num_classes=3")
    one = cache_latents(images, tmp_path / "a.h5", recipe, device="cpu")
    assert cache_latents(packed, tmp_path / "b.h5", recipe, device="cpu").content_hash == one.content_hash
