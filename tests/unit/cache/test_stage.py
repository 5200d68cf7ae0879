"""The cache stage in this process: made, resumed, refused."""

import errno
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.caches import make_images, pixel_recipe
from xar_cli.cache import CacheSettings, cache_latents
from xar_cli.cache import pipeline as pipeline_module
from xar_cli.cache.stage import plan_cache
from xar_cli.data import images as images_module
from xar_cli.data.cache_file import CacheFile
from xar_cli.data.latents import LatentReader, LatentWriter
from xar_cli.errors import UserError

NUM_CLASSES, PER_CLASS = 3, 9
RECIPE = pixel_recipe(f"data.num_classes={NUM_CLASSES}")


@pytest.fixture
def images(tmp_path):
    """27 grey images of 8 x 8 random pixels in three classes."""
    return make_images(tmp_path / "images", NUM_CLASSES, PER_CLASS)


def make(images, out, **settings):
    return cache_latents(images, out, RECIPE, device="cpu", **{"batch_size": 4, **settings})


def test_moments_of_image_and_mirror_are_stored(images, tmp_path):
    summary = make(images, tmp_path / "latents.h5", dtype="float32")
    assert (summary.num_samples, summary.num_missing, summary.num_bad, summary.num_encoded) == (27, 0, 0, 27)
    reader = LatentReader(tmp_path / "latents.h5")
    pixels = np.asarray(Image.open(images / "class-1" / "004.png"), np.float32) / 127.5 - 1
    moments, labels = reader.read(np.array([13, 13]), np.array([False, True]))
    assert labels.tolist() == [1, 1]
    assert np.allclose(moments[0, 0], pixels, atol=1e-6)
    assert np.allclose(moments[1, 0], pixels[:, ::-1], atol=1e-6)
    assert (moments[:, 1] == -30).all()
    reader.check_matches(RECIPE)


def test_without_flip_there_is_one_set_of_moments(images, tmp_path):
    make(images, tmp_path / "latents.h5", flip="none")
    assert not LatentReader(tmp_path / "latents.h5").flip


def test_a_second_run_has_nothing_to_do(images, tmp_path):
    first = make(images, tmp_path / "latents.h5")
    before = (tmp_path / "latents.h5").read_bytes()
    second = make(images, tmp_path / "latents.h5")
    assert (second.num_encoded, second.content_hash) == (0, first.content_hash)
    assert (tmp_path / "latents.h5").read_bytes() == before


def test_an_interrupted_run_goes_on_and_makes_the_same_bytes(images, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.h5", tmp_path / "broken.h5"
    make(images, whole)
    monkeypatch.setattr(pipeline_module, "COMMIT_ROWS", 4)
    real, calls = LatentWriter.commit, []

    def commit(self):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(LatentWriter, "commit", commit)
    with pytest.raises(UserError, match="No space left on device") as caught:
        make(images, broken)
    assert caught.value.exit_code == 1
    monkeypatch.setattr(LatentWriter, "commit", real)
    assert (CacheFile(broken).states == 1).sum() == 12
    assert make(images, broken).num_encoded == 15
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("call", [20, 21])  # to the threads that load, and to the one that writes
def test_a_signal_never_breaks_into_the_handing_over_of_work(images, tmp_path, monkeypatch, number, ends, call):
    """There it could leave a thread waiting for ever. The block in work is stored; the work ends before the next."""
    stopped, whole = tmp_path / "stopped.h5", tmp_path / "whole.h5"
    real, calls = ThreadPoolExecutor.submit, []

    def submit(self, *arguments):
        calls.append("begun")
        if len(calls) == call:
            signal.raise_signal(number)
            calls.append("gone on")
        return real(self, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(ends):
        make(images, stopped, batch_size=1)
    assert calls[call] == "gone on"
    done = (CacheFile(stopped).states == 1).sum()
    assert 0 < done < 27
    monkeypatch.undo()
    assert make(images, stopped, batch_size=1).num_encoded == 27 - done
    make(images, whole, batch_size=1)
    assert stopped.read_bytes() == whole.read_bytes()


def test_bad_images_end_the_work_and_what_was_made_is_kept(images, tmp_path):
    (images / "class-2" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"class-2/003\.png") as caught:
        make(images, tmp_path / "latents.h5")
    assert caught.value.exit_code == 1
    assert (CacheFile(tmp_path / "latents.h5").states == 1).sum() >= 16
    listed = [json.loads(line) for line in (tmp_path / "latents.h5.bad.jsonl").read_text().splitlines()]
    assert [(record["row"], record["name"].endswith("class-2/003.png")) for record in listed] == [(21, True)]
    with pytest.raises(UserError, match="not finished"):
        LatentReader(tmp_path / "latents.h5")


def test_bad_images_are_left_out_when_allowed(images, tmp_path):
    whole = make(images, tmp_path / "whole.h5")
    kept = (images / "class-2" / "003.png").read_bytes()
    (images / "class-2" / "003.png").write_bytes(kept[:40])
    summary = make(images, tmp_path / "latents.h5", max_bad=1)
    assert (summary.num_samples, summary.num_bad) == (26, 1)
    assert LatentReader(tmp_path / "latents.h5").num_samples == 26
    (images / "class-2" / "003.png").write_bytes(kept)  # mended: the same command takes it in
    again = make(images, tmp_path / "latents.h5", max_bad=1)
    assert (again.num_encoded, again.num_bad, again.content_hash) == (1, 0, whole.content_hash)
    assert not (tmp_path / "latents.h5.bad.jsonl").exists()


def test_images_that_are_stored_stay_stored_when_they_become_unreadable(images, tmp_path):
    (images / "class-2" / "003.png").write_bytes(b"")
    first = make(images, tmp_path / "latents.h5", batch_size=27, max_bad=1)
    before = (tmp_path / "latents.h5").read_bytes()
    (images / "class-0" / "005.png").write_bytes(b"")
    again = make(images, tmp_path / "latents.h5", batch_size=27, max_bad=1)
    assert (again.num_samples, again.num_bad, again.content_hash) == (26, 1, first.content_hash)
    assert (tmp_path / "latents.h5").read_bytes() == before


@pytest.mark.parametrize("failure", [OSError(errno.ESTALE, os.strerror(errno.ESTALE)), MemoryError()])
def test_a_machine_that_cannot_read_ends_the_work_and_sets_nothing_aside(images, tmp_path, monkeypatch, failure):
    out = tmp_path / "latents.h5"
    make(images, tmp_path / "whole.h5")

    def fail_late(path, *_):
        if "class-2" in str(path):
            raise failure
        return open(path, "rb")

    with monkeypatch.context() as patch:
        patch.setattr(images_module, "open", fail_late, raising=False)
        with pytest.raises(UserError, match=r"Stale file handle|memory does not suffice") as caught:
            make(images, out, max_bad=None)
    assert caught.value.exit_code == 1
    states = CacheFile(out).states
    assert (states[:16] == 1).all()
    assert not (states == 2).any()
    make(images, out)
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_bad_image_leaves_no_trace_of_the_sound_one_that_it_was(images, tmp_path):
    out, row = tmp_path / "latents.h5", 21
    make(images, out)
    with LatentWriter(out) as writer:  # a run that died after the data and before the state
        writer._put(row, "written", np.uint8(0))
    (images / "class-2" / "003.png").write_bytes(b"")
    make(images, out, max_bad=1)
    make(images, tmp_path / "whole.h5", max_bad=1)
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_wrong_class_count_says_what_to_set(images, tmp_path):
    with pytest.raises(UserError, match=r"--set data\.num_classes=3"):
        cache_latents(images, tmp_path / "latents.h5", pixel_recipe(), device="cpu")
    assert not (tmp_path / "latents.h5").exists()


@pytest.mark.parametrize(("change", "what"), [({"dtype": "float32"}, "dtype float16"), ({"flip": "none"}, "flip True")])
def test_a_cache_made_in_another_way_is_not_continued(images, tmp_path, change, what):
    make(images, tmp_path / "latents.h5")
    with pytest.raises(UserError, match=what):
        make(images, tmp_path / "latents.h5", **change)


def test_a_cache_of_other_images_is_not_continued(images, tmp_path):
    make(images, tmp_path / "latents.h5")
    (images / "class-0" / "000.png").rename(images / "class-0" / "zero.png")
    with pytest.raises(UserError, match="other images"):
        make(images, tmp_path / "latents.h5")


@pytest.mark.parametrize(
    "settings", [{"flip": "both"}, {"dtype": "bfloat16"}, {"batch_size": 0}, {"workers": 0}, {"max_bad": -1}]
)
def test_values_out_of_range_are_refused(images, tmp_path, settings):
    with pytest.raises(UserError):
        make(images, tmp_path / "latents.h5", **settings)
    assert not (tmp_path / "latents.h5").exists()


def test_the_plan_writes_nothing(images, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    settings = CacheSettings(images=images, out=tmp_path / "new" / "latents.h5", config=RECIPE, device="cpu")
    plan = plan_cache(settings).as_dict()
    assert (plan["images"], plan["classes"], plan["done"], plan["grid"]) == (27, 3, 0, (8, 8))
    assert sorted(tmp_path.rglob("*")) == before
