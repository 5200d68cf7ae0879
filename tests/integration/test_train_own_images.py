"""The worked example of docs/training.md: a folder of images, an odd size, without classes, to samples and status."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from tests.caches import make_images
from xar_cli.cli.app import app

OVERRIDES = (
    "data={dataset: mine, image_size: 24, image_channels: 1, mirror: false, num_images: 27}",
    "tokenizer={kind: pixels, patch: 2, latent_scale: 1.0}",
    "entity={kind: cell, size: 6}",  # 12 x 12 tokens
    "model={dim: 16, depth: 1, heads: 2}",
    "train.global_batch_size=9",
    "train.epochs=2",
    "train.log_every=1",
    "sample.num_steps=2",
)


def xar(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def sets(*more):
    return [part for override in (*OVERRIDES, *more) for part in ("--set", override)]


def test_with_and_without_classes(tmp_path):
    images = make_images(tmp_path / "images", side=30)
    for classes in (3, 0):
        recipe = ("--recipe", "tiny", *sets(f"data.num_classes={classes}"), "--device", "cpu")
        cache, run = tmp_path / f"{classes}.h5", tmp_path / f"run-{classes}"
        cache_classes = ("--recipe", "tiny", *sets("data.num_classes=3"), "--device", "cpu")
        xar("cache-latents", "--images", images, "--out", cache, *cache_classes)
        plan = json.loads(xar("train", *recipe, "--data", cache, "--out", run, "--dry-run", "--json"))
        assert plan["total_steps"] == 6
        assert not run.exists()
        result = json.loads(xar("train", *recipe, "--data", cache, "--out", run, "--json"))
        assert result["steps"] == 6
        made = json.loads(xar("sample", "--run", run, "--count", "4", "--device", "cpu", "--json"))
        assert made["count"] == 4
        status = json.loads(xar("status", run, "--json"))
        assert (status["state"], status["healthy"], status["step"]) == ("finished", True, 6)
