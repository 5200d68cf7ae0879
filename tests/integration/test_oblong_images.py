"""Images that are not square, from a folder to samples: every stage, with entities of every kind that has a choice."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.runs import final_tensors
from xar_cli.cli.app import app
from xar_cli.data.latents import LatentReader
from xar_cli.run_dir import RunDir

HEIGHT, WIDTH, COUNT = 8, 12, 18  # pixels; images of 2 classes
KINDS = {
    "cell": "{kind: cell, size: [2, 3]}",
    "subsample": "{kind: subsample, stride: 2, order: centre_out}",
    "scale": "{kind: scale, sizes: [1, [2, 3], [4, 6]]}",
    "token": "{kind: token, order: centre_out}",
}
OVERRIDES = (
    "data={dataset: mine, image_size: [8, 12], image_channels: 1, mirror: true, num_classes: 2}",
    "tokenizer={kind: pixels, patch: 2, latent_scale: 1.0}",  # 4 x 6 tokens
    "model={dim: 16, depth: 1, heads: 2, dropout: 0.1}",
    "train.global_batch_size=6",
    "train.epochs=2",  # 6 steps
    "train.checkpoint_every=2",
    "train.keep_last=3",
    "train.preview_every=6",
    "train.preview_count=4",
    "sample.num_steps=2",
    "sample.batch_size=3",
)


def xar(*arguments) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def recipe(kind: str) -> list[str]:
    sets = [part for override in (*OVERRIDES, f"entity={KINDS[kind]}") for part in ("--set", override)]
    return ["--recipe", "tiny", *sets, "--device", "cpu"]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """What the crop leaves of every image: (18, 8, 12)."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, HEIGHT, WIDTH), dtype=np.uint8)


@pytest.fixture(scope="module")
def cache(pixels, tmp_path_factory):
    """The images four times as large, with a border at top and bottom that the crop takes away, and cached."""
    folder = tmp_path_factory.mktemp("oblong")
    for index, image in enumerate(pixels):
        path = folder / "images" / f"class-{index // 9}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        large = np.kron(image, np.ones((4, 4), np.uint8))
        Image.fromarray(np.pad(large, ((8, 8), (0, 0)))).save(path)
    made = xar("cache-latents", "--images", folder / "images", "--out", folder / "latents.h5", *recipe("cell"))
    assert (made["num_samples"], made["num_missing"]) == (COUNT, 0)
    return folder / "latents.h5"


def test_the_cache_holds_the_crop(cache, pixels):
    moments, _ = LatentReader(cache).read(np.arange(COUNT), np.arange(COUNT) % 2 == 1)
    expected = pixels.copy()
    expected[1::2] = expected[1::2, :, ::-1]
    folded = expected.reshape(COUNT, 4, 2, 6, 2).transpose(0, 2, 4, 1, 3).reshape(COUNT, 4, 4, 6)
    assert np.array_equal(moments[:, :4], (folded / np.float32(127.5) - 1).astype(np.float16))
    about = xar("cache-latents", "info", cache)
    assert (about["image_size"], about["grid"], about["complete"]) == ([8, 12], [4, 6], True)
    again = xar("cache-latents", "--images", cache.parent / "images", "--out", cache, *recipe("cell"))
    assert again["num_encoded"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_train_resume_sample_and_pack(cache, tmp_path, kind):
    run = tmp_path / "run"
    train = ("train", *recipe(kind), "--data", cache)
    assert xar(*train, "--out", run)["steps"] == 6
    with Image.open(RunDir(run).previews / "step-00000006.png") as preview:
        assert preview.size == (2 * (72 + 2) + 2, 2 * (48 + 2) + 2)  # 2 x 2 tiles, six times as large

    shutil.copytree(run, tmp_path / "resumed")
    for step in (4, 6):
        shutil.rmtree(RunDir(tmp_path / "resumed").checkpoints / f"step-{step:08d}")
    xar(*train, "--out", tmp_path / "resumed")
    whole, resumed = final_tensors(run), final_tensors(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

    out = tmp_path / "samples"
    sample = ("sample", "--run", run, "--count", 6, "--out", out, "--pack", "npz", "--pack", "hdf5", "--device", "cpu")
    assert xar(*sample, "--dry-run")["images"] == "6 of 8 x 12 pixels (height x width)"
    made = xar(*sample)
    assert (made["made"], xar(*sample)["made"]) == (6, 0)
    assert json.loads((out / "manifest.json").read_text())["image_size"] == [8, 12]
    images = np.stack([np.asarray(Image.open(out / f"{index:06d}.png")) for index in range(6)])
    assert images.shape == (6, HEIGHT, WIDTH)
    with np.load(made["npz"]) as packed:
        assert np.array_equal(packed["arr_0"], images[..., None].repeat(3, axis=-1))
    with h5py.File(made["hdf5"]) as file:
        assert np.array_equal(file["images"][..., 0], images)

    xar("weights", "convert", run, tmp_path / "mine.safetensors")
    exported = ("sample", "--weights", tmp_path / "mine.safetensors", "--device", "cpu")
    picture = tmp_path / "grid.png"
    xar(*exported, "--grid", "3x2", "--save", picture, "--out", tmp_path / "again")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "000005.png")), images[5])
    with Image.open(picture) as grid:
        assert grid.size == (3 * (72 + 2) + 2, 2 * (48 + 2) + 2)
    xar(*exported, "--explain", picture)
    with Image.open(picture) as explained:
        assert explained.width == 92 + 3 * (112 + 4)  # t = 1, 0.5, 0
        assert explained.height % (75 + 18 + 4) == 0  # 112 * 8 / 12 rows of pixels in a tile
