"""The cache file: what is written is read, from any thread or process, and damage is noticed."""

import fcntl
import multiprocessing
import os
import pickle
import threading

import h5py
import numpy as np
import pytest

from tests.caches import LABELS, N, make_cache, make_layout, make_moments, pixel_recipe
from xar_cli.cache.stage import cache_lock
from xar_cli.config import load_recipe
from xar_cli.data import cache_file, latents
from xar_cli.data.cache_file import CacheFile, hash_source, shard_bounds
from xar_cli.data.latents import LatentReader, LatentWriter
from xar_cli.errors import UserError


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def cache(request, tmp_path):
    return make_cache(tmp_path / "latents.h5", num_shards=request.param)


def test_reads_what_was_written(cache):
    image, mirror = make_moments()
    with LatentReader(cache) as reader:
        indices = np.array([5, 36, 0, 5, 20])
        mirrored = np.array([False, True, True, True, False])
        moments, labels = reader.read(indices, mirrored)
    expected = np.where(mirrored[:, None, None, None], mirror[indices], image[indices]).astype(np.float16)
    assert np.array_equal(moments, expected)
    assert labels.tolist() == [5, 6, 0, 5, 0]
    assert labels.dtype == np.int64


def test_says_what_it_holds(cache):
    reader = LatentReader(cache)
    assert (reader.num_samples, reader.num_classes, reader.grid, reader.latent_channels) == (N, 10, (8, 8), 1)
    assert (reader.image_size, reader.image_channels, reader.latent_scale) == (8, 1, 1.0)
    assert (reader.flip, reader.tokenizer, reader.class_names[3]) == (True, "pixels/p1", "digit-3")


def test_opens_whole_in_any_hdf5_program(cache):
    with h5py.File(cache, "r") as file:
        assert np.array_equal(file["moments_flip"][:], make_moments()[1].astype(np.float16))
        assert file["labels"][:].tolist() == LABELS.tolist()
        assert file["names"][4] == b"004.png"
        assert file.attrs["format_version"] == 1


def test_values_beyond_float16_are_refused_and_float32_is_advised(tmp_path):
    values = np.full((1, 2, 8, 8), 1e5, np.float32)
    with LatentWriter(make_cache(tmp_path / "half.h5", finish=False)) as writer:
        with pytest.raises(UserError, match=r"image 3 reach 1e\+05, which float16 .*--dtype float32"):
            writer.write(np.array([3]), values, values)
        writer.commit()
    assert not CacheFile(tmp_path / "half.h5").states.any()
    path = make_cache(tmp_path / "full.h5", make_layout(dtype="float32"))
    with LatentWriter(path) as writer:
        writer.write(np.array([3]), values, values)
        writer.commit()
    assert (LatentReader(path).read(np.array([3]))[0] == 1e5).all()


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_link_to_a_cache_is_the_cache(tmp_path, num_shards):
    path = make_cache(tmp_path / "data" / "latents.h5", num_shards=num_shards)
    (tmp_path / "project").mkdir()
    link = tmp_path / "project" / "train.h5"
    link.symlink_to(path)
    assert np.array_equal(LatentReader(link).read(np.arange(N))[0], LatentReader(path).read(np.arange(N))[0])
    with cache_lock(path) as lock:
        lock.take()
        with cache_lock(link) as second, pytest.raises(UserError, match="is being written by"):
            second.take()


def test_a_square_cache_says_one_side_as_it_always_did(tmp_path):
    path = make_cache(tmp_path / "latents.h5", make_layout(source="abc"))
    with h5py.File(path) as file:
        assert (file.attrs["image_size"].shape, file.attrs["image_size"].dtype) == ((), np.int64)
    # The content hash of this cache in version 0.1.0: runs are held to it.
    assert LatentReader(path).content_hash == "85aaf4488a5fef06a9ec5b4049e84b43b99ee284ed6a747c0b051528b9b5dbc2"


def test_a_cache_of_oblong_images_says_height_and_width(tmp_path):
    path = make_cache(tmp_path / "latents.h5", make_layout(image_size=(8, 16)))
    with h5py.File(path) as file:
        assert (file.attrs["image_size"].tolist(), file.attrs["format_version"]) == ([8, 16], 1)
    reader = LatentReader(path)
    assert reader.image_size == (8, 16)
    with pytest.raises(UserError, match=r"image size \(8 x 16\) than recipe 'tiny' has \(8 x 8\)"):
        reader.check_matches(pixel_recipe())
    with h5py.File(path, "r+") as file:
        file.attrs["image_size"] = [8, 16, 3]
    with pytest.raises(UserError, match="cannot be read as a latent cache"):
        LatentReader(path)


def test_shards_may_move_together(tmp_path):
    make_cache(tmp_path / "here" / "latents.h5", num_shards=2)
    (tmp_path / "here").rename(tmp_path / "there")
    moments, _ = LatentReader(tmp_path / "there" / "latents.h5").read(np.arange(N))
    assert np.array_equal(moments, make_moments()[0].astype(np.float16))
    with h5py.File(tmp_path / "there" / "latents.h5") as file:
        assert np.array_equal(file["moments"][:], moments)


def test_a_missing_shard_is_named(tmp_path):
    path = make_cache(tmp_path / "latents.h5", num_shards=2)
    (tmp_path / "latents.shard-00001-of-00002.h5").unlink()
    with pytest.raises(UserError, match=r"lacks its part 'latents\.shard-00001-of-00002\.h5"):
        LatentReader(path)


@pytest.mark.parametrize("lacking", ["all", "first_row"])
def test_parts_that_say_nothing_of_themselves_are_read(tmp_path, lacking):
    path = make_cache(tmp_path / "latents.h5", num_shards=2)
    for part in tmp_path.glob("latents.shard-*.h5"):
        with h5py.File(part, "r+") as file:
            for name in list(file.attrs) if lacking == "all" else [lacking]:
                del file.attrs[name]
    whole = LatentReader(make_cache(tmp_path / "whole" / "latents.h5"))
    assert LatentReader(path).content_hash == whole.content_hash


def test_the_content_hash_knows_the_data_and_not_the_files(tmp_path):
    one = LatentReader(make_cache(tmp_path / "a.h5")).content_hash
    assert LatentReader(make_cache(tmp_path / "b.h5", num_shards=2)).content_hash == one
    with LatentWriter(tmp_path / "a.h5") as writer:
        writer.write(np.array([3]), make_moments(1)[0][:1], make_moments(1)[1][:1])
    assert LatentReader(tmp_path / "a.h5").content_hash != one


def test_without_commit_nothing_counts(tmp_path):
    path = make_cache(tmp_path / "latents.h5", finish=False)
    image, mirror = make_moments()
    with LatentWriter(path) as writer:
        writer.write(np.arange(4), image[:4], mirror[:4])
        writer.commit()
        writer.write(np.arange(4, 8), image[4:8], mirror[4:8])
    assert CacheFile(path).states.tolist() == [1] * 4 + [0] * (N - 4)
    with pytest.raises(UserError, match=f"not finished: 4 of {N}"):
        LatentReader(path)


def test_data_is_flushed_before_it_counts(tmp_path, monkeypatch):
    path = make_cache(tmp_path / "latents.h5", finish=False)
    seen = []
    monkeypatch.setattr(latents, "_sync_data", lambda descriptor: seen.append(CacheFile(path).states.sum()))
    image, mirror = make_moments()
    with LatentWriter(path) as writer:
        writer.write(np.arange(4), image[:4], mirror[:4])
        writer.commit()
    assert seen == [0, 4]  # the data before the states, the states when the file is closed
    assert CacheFile(path).states.sum() == 4


def test_bad_rows_are_left_out(tmp_path):
    reader = LatentReader(make_cache(tmp_path / "latents.h5", skip=(2, 10)))
    kept = np.array([row for row in range(N) if row not in (2, 10)])
    moments, labels = reader.read(np.arange(reader.num_samples))
    assert np.array_equal(moments, make_moments()[0][kept].astype(np.float16))
    assert np.array_equal(labels, LABELS[kept])


def test_reading_needs_no_hdf5_lock(cache):
    with cache.open("rb") as held:  # as a writer of HDF5 in another process holds it
        fcntl.flock(held, fcntl.LOCK_EX)
        assert LatentReader(cache).read(np.array([1]))[1].tolist() == [1]


def test_reads_a_file_that_this_process_has_open_in_hdf5(cache):
    with h5py.File(cache, "r"):
        assert LatentReader(cache).read(np.array([1]))[1].tolist() == [1]


def test_survives_fork_and_pickle(cache):
    reader = LatentReader(cache)
    expected = reader.read(np.arange(N))[0]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        parts = pool.map(_Read(reader), [np.arange(0, 20), np.arange(20, N)])
    assert np.array_equal(np.concatenate(parts), expected)
    assert np.array_equal(pickle.loads(pickle.dumps(reader)).read(np.arange(N))[0], expected)


class _Read:
    """Reads in a worker process, through the reader it was forked with."""

    def __init__(self, reader):
        self.reader = reader

    def __call__(self, indices):
        return self.reader.read(indices)[0]


def test_threads_share_a_reader(cache):
    reader, image = LatentReader(cache), make_moments()[0].astype(np.float16)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            indices = rng.integers(0, N, 16)
            if not np.array_equal(reader.read(indices)[0], image[indices]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


@pytest.mark.parametrize("options", [{"chunks": (5, 2, 8, 8)}, {"chunks": True, "compression": "gzip"}])
def test_chunked_and_compressed_files_are_read_through_hdf5(tmp_path, options):
    plain = make_cache(tmp_path / "plain.h5")
    with h5py.File(plain) as old, h5py.File(tmp_path / "packed.h5", "w") as new:
        new.attrs.update(old.attrs)
        for name, dataset in old.items():
            new.create_dataset(name, data=dataset[:], **(options if name.startswith("moments") else {}))
    reader = LatentReader(tmp_path / "packed.h5")
    indices, mirrored = np.array([7, 1, 30]), np.array([True, False, True])
    expected = LatentReader(plain).read(indices, mirrored)[0]
    assert np.array_equal(reader.read(indices, mirrored)[0], expected)
    with multiprocessing.get_context("fork").Pool(1) as pool:  # after the parent has opened its handle
        assert np.array_equal(pool.map(_Read(reader), [indices])[0], reader.read(indices)[0])
    assert np.array_equal(pickle.loads(pickle.dumps(reader)).read(indices, mirrored)[0], expected)


def test_short_reads_are_completed(cache, monkeypatch):
    reader, preadv = LatentReader(cache), os.preadv
    expected = reader.read(np.arange(N))[0]
    monkeypatch.setattr(os, "preadv", lambda fd, parts, place: preadv(fd, [parts[0][:100]], place))
    assert np.array_equal(reader.read(np.arange(N))[0], expected)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = make_cache(tmp_path / "latents.h5")
    reader = LatentReader(path)
    os.truncate(path, 5000)
    with pytest.raises(OSError, match="shorter"):
        reader.read(np.arange(N))


@pytest.mark.parametrize("indices", [[-1], [N], [0, 99]])
def test_a_sample_number_out_of_range_is_refused(cache, indices):
    with pytest.raises(IndexError):
        LatentReader(cache).read(np.array(indices))


def test_mirror_images_must_be_there(tmp_path):
    reader = LatentReader(make_cache(tmp_path / "latents.h5", make_layout(flip=False)))
    assert reader.read(np.array([1]), np.array([False]))[1].tolist() == [1]
    with pytest.raises(ValueError, match="no mirror images"):
        reader.read(np.array([1]), np.array([True]))


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    path = make_cache(tmp_path / "latents.h5", finish=False)
    with LatentWriter(path) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.write(np.arange(2), make_moments()[0][:2])


def test_float32_is_kept_exactly_and_the_cost_of_float16_is_recorded(tmp_path):
    image, mirror = make_moments()
    exact = make_cache(tmp_path / "exact.h5", make_layout(dtype="float32"))
    assert np.array_equal(LatentReader(exact).read(np.arange(N))[0], image)
    assert CacheFile(exact).rounding().max() == 0
    half = CacheFile(make_cache(tmp_path / "half.h5")).rounding()
    errors = np.stack([m.astype(np.float16).astype(np.float32) - m for m in (image, mirror)])
    assert np.allclose(half[:, 0], np.sqrt(np.square(errors).mean((0, 2, 3, 4))), rtol=1e-4)
    assert np.allclose(half[:, 1], np.abs(errors).max((0, 2, 3, 4)))


def test_missing_foreign_truncated_and_future_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no latent cache"):
        LatentReader(tmp_path / "nothing.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(UserError, match="cannot be read"):
        LatentReader(tmp_path / "text.h5")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(UserError, match="no latent cache"):
        LatentReader(tmp_path / "other.h5")
    path = make_cache(tmp_path / "latents.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(UserError, match="format version 2"):
        LatentReader(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 1
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="trunc"):
        LatentReader(path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("data.num_classes=11", "num_classes=10"),
        ("data.image_size=16", "image size"),
        ("tokenizer.latent_scale=2.0", "latent scale"),
        ("tokenizer={kind: pixels, patch: 2}", "grid"),
        ("data.image_channels=3", "image channels"),
    ],
)
def test_a_cache_for_another_recipe_is_refused(tmp_path, change, what):
    reader = LatentReader(make_cache(tmp_path / "latents.h5"))
    reader.check_matches(pixel_recipe())
    with pytest.raises(UserError) as caught:
        reader.check_matches(pixel_recipe(change, "entity.size=2"))
    assert what in str(caught.value)


def test_a_cache_of_another_tokenizer_is_refused(tmp_path):
    reader = LatentReader(make_cache(tmp_path / "latents.h5"))
    with pytest.raises(UserError, match="tokenizer"):
        reader.check_matches(load_recipe("base"))


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"TB needed, .* free"):
        make_cache(tmp_path / "new" / "latents.h5", make_layout(grid=(1 << 20, 1 << 20)))
    assert not (tmp_path / "new").exists()


def test_a_failed_creation_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_file, "reserve_and_sync", full)
    with pytest.raises(OSError, match="No space"):
        make_cache(tmp_path / "latents.h5")
    assert list(tmp_path.iterdir()) == []


def test_shard_bounds_are_even_and_cut_between_units():
    assert shard_bounds(100, 3, unit=8) == [(0, 32), (32, 64), (64, 100)]
    assert shard_bounds(5, 4, unit=2) == [(0, 1), (1, 2), (2, 3), (3, 5)]


def test_the_source_hash_knows_names_and_labels():
    base = hash_source([b"a", b"b"], np.array([0, 1]))
    assert base == hash_source([b"a", b"b"], np.array([0, 1], np.int32))
    assert base != hash_source([b"a", b"b"], np.array([0, 0]))
    assert base != hash_source([b"a", b"c"], np.array([0, 1]))
