"""Names and class tables: bytes that are no text, ImageNet's ids, no classes at all."""

import json
import os
import shutil

import numpy as np

from tests.caches import make_images, pixel_recipe
from xar_cli.cache import cache_latents
from xar_cli.cache.verify import inspect_cache, verify_cache
from xar_cli.data.cache_file import CacheFile
from xar_cli.data.latents import LatentReader


def test_names_that_are_not_utf8_go_through_the_whole_stage(tmp_path):
    images = make_images(tmp_path / "images", 2, 2)
    os.rename(images / "class-1", os.fsencode(images) + b"/caf\xe9")
    bad = os.fsdecode(os.fsencode(images) + b"/caf\xe9/\xff.png")
    with open(bad, "wb") as file:
        file.write(b"none")
    out = tmp_path / "latents.h5"
    summary = cache_latents(images, out, pixel_recipe("data.num_classes=2"), device="cpu", max_bad=1)
    assert (summary.num_samples, summary.num_bad) == (4, 1)
    assert b"caf\xe9/\xff.png" in CacheFile(out).names()
    assert LatentReader(out).class_names == ("caf\\xe9", "class-0")
    assert json.loads(json.dumps(inspect_cache(out)))["classes"][0]["name"] == "caf\\xe9"
    (listed,) = (tmp_path / "latents.h5.bad.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(listed)["name"].endswith("caf\\xe9/\\xff.png")
    assert cache_latents(images, out, pixel_recipe("data.num_classes=2"), device="cpu", max_bad=1).num_encoded == 0


def test_imagenet_ids_get_their_readable_names(tmp_path):
    images = make_images(tmp_path / "images", 2, 1)
    (images / "class-0").rename(images / "n01440764")
    cache_latents(images, tmp_path / "x.h5", pixel_recipe("data.num_classes=2"), device="cpu")
    assert LatentReader(tmp_path / "x.h5").class_titles == ("class-1", "tench")


def test_images_without_classes(tmp_path):
    images = make_images(tmp_path / "images", 1, 5) / "class-0"
    recipe = pixel_recipe("data.num_classes=0")
    cache_latents(images, tmp_path / "x.h5", recipe, device="cpu")
    reader = LatentReader(tmp_path / "x.h5")
    assert (reader.num_classes, reader.class_names) == (0, ())
    assert reader.read(np.arange(5))[1].tolist() == [0] * 5
    reader.check_matches(recipe)
    assert verify_cache(tmp_path / "x.h5", recipe).ok


def test_a_folder_with_classes_trains_a_recipe_without(tmp_path):
    recipe = pixel_recipe("data.num_classes=0")
    cache_latents(make_images(tmp_path / "images"), tmp_path / "x.h5", recipe, device="cpu")
    LatentReader(tmp_path / "x.h5").check_matches(recipe)


def test_the_cache_does_not_need_its_images_any_more(tmp_path):
    images = make_images(tmp_path / "images")
    cache_latents(images, tmp_path / "x.h5", pixel_recipe("data.num_classes=3"), device="cpu")
    shutil.rmtree(images)
    assert verify_cache(tmp_path / "x.h5").ok
