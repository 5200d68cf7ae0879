"""Verify finds what is wrong with a cache; info says what it is."""

import h5py
import numpy as np
import pytest

from tests.caches import LABELS, N, make_cache, make_layout, make_moments, pixel_recipe
from xar_cli.cache.verify import inspect_cache, verify_cache
from xar_cli.data.latents import LatentWriter
from xar_cli.errors import UserError


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def cache(request, tmp_path):
    return make_cache(tmp_path / "latents.h5", num_shards=request.param)


def rewrite(path, row, values):
    """Other moments in one row, with a checksum that fits."""
    with LatentWriter(path) as writer:
        writer.write(np.array([row]), values, values)


def damage(path, row):
    """Other bytes in one row, behind the writer's back."""
    with h5py.File(path, "r+") as file:
        file["moments"][row, 0, 3, 3] += np.float16(1)


def test_a_sound_cache_passes(cache):
    verdict = verify_cache(cache, pixel_recipe(), "pixels/p1")
    assert verdict.ok
    assert (verdict.num_samples, verdict.num_missing, verdict.num_bad, verdict.num_classes) == (N, 0, 0, 10)
    assert (verdict.warnings, verdict.dead, verdict.duplicates) == ([], 0, 0)


def test_the_statistics_are_those_of_sampled_latents(tmp_path):
    path = make_cache(tmp_path / "latents.h5", make_layout(dtype="float32"))
    moments = make_moments().astype(np.float64).reshape(2 * N, 2, 64)
    samples = moments[:, :1] + np.exp(0.5 * moments[:, 1:]) * np.random.default_rng(5).standard_normal((2 * N, 100, 64))
    verdict = verify_cache(path)
    assert verdict.channel_mean == pytest.approx([samples.mean()], abs=0.01)
    assert verdict.channel_std == pytest.approx([samples.std()], rel=0.01)
    assert verdict.scaled_std == pytest.approx(samples.std(), rel=0.01)


def test_changed_bytes_are_found(tmp_path):
    path = make_cache(tmp_path / "latents.h5")
    damage(path, 11)
    verdict = verify_cache(path)
    assert verdict.faults == ["1 rows have other bytes than were written: 11"]
    assert verdict.as_dict()["ok"] is False


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_found(cache, value):
    values = make_moments()[0][:1]
    values[0, 0, 0, 0] = value
    rewrite(cache, 8, values)
    assert verify_cache(cache).faults == ["1 rows hold NaN or Inf: 8"]


def test_dead_and_doubled_rows_are_warned_of(cache):
    rewrite(cache, 8, np.zeros((1, 2, 8, 8), np.float32))
    rewrite(cache, 30, np.zeros((1, 2, 8, 8), np.float32))
    verdict = verify_cache(cache)
    assert verdict.ok
    assert (verdict.dead, verdict.duplicates) == (2, 1)
    assert "2 rows are the same everywhere (blank images): 8, 30" in verdict.warnings


def test_missing_rows_are_a_fault_and_bad_ones_are_not(tmp_path):
    unfinished = verify_cache(make_cache(tmp_path / "a.h5", finish=False))
    assert unfinished.faults == [f"{N} of {N} images are not done"]
    verdict = verify_cache(make_cache(tmp_path / "b.h5", skip=(2, 3)))
    assert (verdict.ok, verdict.num_bad, verdict.num_samples) == (True, 2, N - 2)


def test_classes_are_checked(tmp_path):
    path = make_cache(tmp_path / "latents.h5", skip=tuple(np.flatnonzero(LABELS == 4)))
    assert verify_cache(path).warnings == ["1 classes have no image: 4"]
    with h5py.File(path, "r+") as file:
        file["labels"][0] = 10
        file["class_names"][1] = b"digit-0"
    faults = verify_cache(path).faults
    assert faults[1:] == ["two classes have the same name", "1 labels lie outside 0 to 9"]
    assert faults[0].startswith("names or labels are not those")


@pytest.mark.parametrize("name", ["labels", "names"])
def test_labels_and_names_that_are_not_the_images_are_found(cache, name):
    for part in [*cache.parent.glob("latents.shard-*.h5")] or [cache]:
        with h5py.File(part, "r+") as file:
            file[name][:] = file[name][:][::-1]
    assert verify_cache(cache).faults == ["names or labels are not those of the images that it was made from"]


def test_a_part_of_another_cache_is_refused(tmp_path):
    here = make_cache(tmp_path / "a" / "latents.h5", num_shards=2)
    there = make_cache(tmp_path / "b" / "latents.h5", make_layout(tokenizer="pixels/p2"), num_shards=2)
    part = "latents.shard-00001-of-00002.h5"
    own = (here.parent / part).read_bytes()
    (here.parent / part).write_bytes((there.parent / part).read_bytes())
    with pytest.raises(UserError, match="belongs to another latent cache"):
        verify_cache(here)
    (here.parent / part).write_bytes(own)
    assert verify_cache(here).ok


def test_a_part_of_other_rows_is_refused(tmp_path):
    path = make_cache(tmp_path / "latents.h5", num_shards=2)
    first, second = sorted(tmp_path.glob("latents.shard-*.h5"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="other rows"):
        verify_cache(path)


def test_a_cache_of_bad_images_alone_has_a_fault(tmp_path):
    path = make_cache(tmp_path / "latents.h5", skip=tuple(range(N)))
    assert verify_cache(path).faults == ["it holds no sample: all images are bad"]


def test_equal_checksums_alone_are_no_duplicates(cache):
    for part in [*cache.parent.glob("latents.shard-*.h5")] or [cache]:
        with h5py.File(part, "r+") as file:
            file["checksums"][2] = file["checksums"][5]
    assert verify_cache(cache).duplicates == 0


def test_a_cache_without_mirror_images_does_not_fit_a_recipe_that_mirrors(tmp_path):
    path = make_cache(tmp_path / "latents.h5", make_layout(flip=False))
    with pytest.raises(UserError, match="holds none"):
        verify_cache(path, pixel_recipe("data.mirror=true"))
    assert verify_cache(path, pixel_recipe("data.mirror=false")).ok


def test_a_scale_that_does_not_fit_is_warned_of(tmp_path):
    path = make_cache(tmp_path / "latents.h5", make_layout(latent_scale=0.1))
    (warning,) = verify_cache(path).warnings
    assert "set tokenizer.latent_scale to" in warning


def test_another_recipe_or_tokenizer_is_refused(cache):
    with pytest.raises(UserError, match="image size"):
        verify_cache(cache, pixel_recipe("data.image_size=16"))
    with pytest.raises(UserError, match="pixels/p1, not pixels/p2"):
        verify_cache(cache, tokenizer="pixels/p2")


def test_info_says_what_the_file_is(tmp_path):
    path = make_cache(tmp_path / "latents.h5", num_shards=2, skip=(5,))
    info = inspect_cache(path)
    assert (info["num_samples"], info["num_bad"], info["rows"], info["complete"]) == (N - 1, 1, N, True)
    assert [part["rows"] for part in info["files"]] == [18, 19]
    assert info["classes"][3] == {"label": 3, "name": "digit-3", "title": "digit-3"}
    assert (info["tokenizer"], info["flip"], info["dtype"]) == ("pixels/p1", True, "float16")
