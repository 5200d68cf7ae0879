"""Weights in every form draw the same images: a run, its export, and its published layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.fake_hub import running_hub
from tests.seeded import seeded_state
from xar_cli.checkpoint import write_checkpoint
from xar_cli.cli.app import main
from xar_cli.config import dump_config, load_recipe
from xar_cli.run_dir import RunDir
from xar_cli.weights import from_published
from xar_cli.weights.published import published_shapes


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of the recipe tiny with seeded weights."""
    config = load_recipe(
        "tiny", ["model.dim=32", "model.depth=1", "model.heads=4", "sample.num_steps=2", "sample.batch_size=4"]
    )
    state = seeded_state(published_shapes(config))
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(dump_config(config))
    averaged = {name: tensor / 2 for name, tensor in state.items()}
    groups = {
        "model": from_published(state, config),
        f"ema-{config.train.ema_decays[0]:g}": from_published(averaged, config),
    }
    write_checkpoint(run, 7, groups, {})
    return run.root


def xar(*arguments: object) -> None:
    with pytest.raises(SystemExit) as leave:
        main([str(argument) for argument in arguments])
    assert not leave.value.code


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_all_forms_of_the_same_weights_draw_the_same_images(run, tmp_path):
    recipe = run / "config.yaml"
    xar("weights", "convert", run, tmp_path / "ours.safetensors")
    xar("weights", "convert", tmp_path / "ours.safetensors", tmp_path / "theirs.pth")
    xar("sample", "--run", run, "--count", 4, "--unbalanced", "--out", tmp_path / "a")
    xar("sample", "--weights", tmp_path / "ours.safetensors", "--count", 4, "--unbalanced", "--out", tmp_path / "b")
    xar(
        "sample",
        "--weights",
        tmp_path / "theirs.pth",
        "--recipe",
        recipe,
        "--count",
        4,
        "--unbalanced",
        "--out",
        tmp_path / "c",
    )
    first = images(tmp_path / "a")
    assert len(first) == 4
    assert images(tmp_path / "b") == first
    assert images(tmp_path / "c") == first
    xar("sample", "--run", run, "--raw", "--count", 4, "--unbalanced", "--out", tmp_path / "raw")
    assert images(tmp_path / "raw") != first


def test_weights_on_the_hub_are_sampled_by_their_name(run, tmp_path):
    xar("weights", "convert", run, tmp_path / "ours.safetensors")
    xar("sample", "--run", run, "--count", 2, "--unbalanced", "--out", tmp_path / "a")
    with running_hub() as hub:
        hub.add("me/mine", "model.safetensors", (tmp_path / "ours.safetensors").read_bytes())
        words = ["sample", "--weights", "hf://me/mine/model.safetensors", "--count", "2", "--unbalanced", "--out"]
        done = subprocess.run(
            [sys.executable, "-m", "xar_cli", *words, str(tmp_path / "b")],
            env=hub.environment(tmp_path / "cache"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "b") == images(tmp_path / "a")


def test_a_mirrored_tokenizer_name_is_understood_by_every_stage(tmp_path):
    """`--tokenizer-weights hf://...` reaches the hub; here it names a file that is not KL-16, and is told so."""
    torch.save({"w": torch.zeros(1)}, tmp_path / "not-kl16.ckpt")
    (tmp_path / "images" / "0").mkdir(parents=True)
    with running_hub() as hub:
        hub.add("me/kl16", "kl16.ckpt", (tmp_path / "not-kl16.ckpt").read_bytes())
        words = "cache-latents --recipe base --images images --out l.h5 --tokenizer-weights hf://me/kl16/kl16.ckpt"
        Image.new("RGB", (256, 256)).save(tmp_path / "images" / "0" / "a.png")
        done = subprocess.run(
            [sys.executable, "-m", "xar_cli", *words.split()],
            env=hub.environment(tmp_path / "cache"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert hub.gets() == [None]
    assert done.returncode == 2, done.stderr
    assert "312 missing" in done.stderr
