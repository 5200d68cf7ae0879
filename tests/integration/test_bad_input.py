"""Bad input to the four stages: one sentence, a next step, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from xar_cli import run_dir
from xar_cli.cli.app import main

SMALL = ["--set", "model.dim=32", "--set", "model.depth=1", "--set", "model.heads=2", "--set", "data.num_classes=2"]
SHORT = ["--set", "train.global_batch_size=8", "--set", "train.epochs=1", "--set", "train.checkpoint_every=2"]


def xar(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def refused(capsys, *arguments: str | Path, code: int = 2) -> str:
    """The error of a command that must be refused."""
    capsys.readouterr()
    assert xar(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    error = next(line for line in captured.err.splitlines() if line.startswith("error: "))
    assert "\n  next: " in captured.err
    return error


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images, their cache, a short run and its samples, all made by the commands."""
    root = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for label in "01":
        (root / "images" / label).mkdir(parents=True)
        for index in range(8):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{index}.png")
    assert (
        xar("cache-latents", "--images", root / "images", "--out", root / "latents.h5", "--recipe", "tiny", *SMALL) == 0
    )
    assert xar("train", "--recipe", "tiny", "--data", root / "latents.h5", "--out", root / "run", *SMALL, *SHORT) == 0
    assert xar("sample", "--run", root / "run", "--count", "4", "--num-steps", "2", "--out", root / "samples") == 0
    return root


@pytest.fixture
def work(made, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "work"))


def test_empty_folder(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    error = refused(
        capsys, "cache-latents", "--images", tmp_path / "images", "--out", tmp_path / "x.h5", "--recipe", "tiny"
    )
    assert "images" in error
    assert not (tmp_path / "x.h5").exists()


def test_unreadable_image_is_named_and_skipped_only_when_asked(capsys, work):
    (work / "images" / "0" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    command = ["cache-latents", "--images", work / "images", "--out", work / "new.h5", "--recipe", "tiny", *SMALL]
    assert xar(*command) in (1, 2)
    assert "torn.png" in capsys.readouterr().err
    assert xar(*command, "--skip-bad", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_bad"] == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.num_classes=3", "class"),
        ("tokenizer.patch=4", "grid"),
        ("data.image_size=16", "16"),
        ("data.mirror=true", "mirror"),
    ],
)
def test_cache_of_another_recipe(capsys, work, override, words):
    error = refused(
        capsys, "train", "--recipe", "tiny", "--data", work / "latents.h5", "--out", work / "other", *SMALL, *SHORT,
        "--set", override,
    )  # fmt: skip
    assert words in error
    assert not (work / "other").exists()


def test_truncated_cache(capsys, work):
    path = work / "latents.h5"
    path.write_bytes(path.read_bytes()[:-3000])
    error = refused(capsys, "train", "--recipe", "tiny", "--data", path, "--out", work / "other", *SMALL, *SHORT)
    assert "latents.h5" in error
    assert not (work / "other").exists()


def test_cache_smaller_than_a_batch(capsys, work):
    error = refused(
        capsys, "train", "--recipe", "tiny", "--data", work / "latents.h5", "--out", work / "other", *SMALL,
        "--set", "train.global_batch_size=64",
    )  # fmt: skip
    assert "16 images" in error
    assert not (work / "other").exists()


def test_folder_of_another_run(capsys, work):
    before = snapshot(work)
    command = ["train", "--recipe", "tiny", "--data", work / "latents.h5", *SMALL, *SHORT]
    assert "train.base_lr" in refused(capsys, *command, "--out", work / "run", "--set", "train.base_lr=1e-3")
    assert "not a run folder" in refused(capsys, *command, "--out", work / "images")
    assert snapshot(work) == before


def test_run_with_another_cache(capsys, work):
    Image.new("L", (8, 8), 255).save(work / "images" / "0" / "0.png")
    cache = work / "other.h5"
    assert xar("cache-latents", "--images", work / "images", "--out", cache, "--recipe", "tiny", *SMALL) == 0
    error = refused(capsys, "train", "--recipe", "tiny", "--data", cache, "--out", work / "run", *SMALL, *SHORT)
    assert "another latent cache" in error


def test_no_disk_space_for_checkpoints(capsys, work, monkeypatch):
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(run_dir.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = refused(
        capsys, "train", "--recipe", "tiny", "--data", work / "latents.h5", "--out", work / "other", *SMALL, *SHORT
    )
    assert "needed" in error
    assert "1.0 KB free" in error
    assert not (work / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "2"], "no class 2"),
        (["--class", "0-9"], "no class 9"),
        (["--class", "dog"], "no class called 'dog'"),
        (["--num-steps", "0"], "num_steps"),
        (["--guidance-scale", "-1"], "guidance_scale"),
        (["--grid", "8by4"], "COLUMNSxROWS"),
    ],
)
def test_sample_requests_that_make_no_sense(capsys, made, tmp_path, arguments, words):
    error_and_faults = refused_with_faults(
        capsys, "sample", "--run", made / "run", "--out", tmp_path / "new", *arguments
    )
    assert words in error_and_faults
    assert not (tmp_path / "new").exists()


def refused_with_faults(capsys, *arguments: str | Path) -> str:
    capsys.readouterr()
    assert xar(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_samples_folder_made_with_other_settings(capsys, work):
    before = snapshot(work)
    error = refused(
        capsys, "sample", "--run", work / "run", "--count", "4", "--num-steps", "3", "--out", work / "samples"
    )
    assert "num_steps: 2 there, 3 here" in error
    assert "not empty" in refused(capsys, "sample", "--run", work / "run", "--out", work / "images")
    assert snapshot(work) == before


def test_weights_of_another_shape(capsys, work):
    folder = next((work / "run" / "checkpoints").iterdir())
    tensors = load_file(next(folder.glob("ema-*.safetensors")))
    tensors["velocity_proj.weight"] = tensors["velocity_proj.weight"][:, :16].contiguous()
    save_file(tensors, work / "odd.safetensors")
    error = refused(
        capsys, "sample", "--weights", work / "odd.safetensors", "--recipe", work / "run" / "config.yaml",
        "--out", work / "new",
    )  # fmt: skip
    assert "velocity_proj.weight" in error
    assert not (work / "new").exists()


def test_fid_of_nothing(capsys, work):
    (work / "none").mkdir()
    error = refused(capsys, "fid", "--samples", work / "none", "--reference", work / "images", "--protocol", "digits")
    assert "none" in error


def test_fid_without_inception_weights_says_where_to_get_them(capsys, made, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    command = ["fid", "--samples", made / "samples", "--reference", made / "images", "--protocol", "adm"]
    capsys.readouterr()
    assert xar(*command) == 2
    err = capsys.readouterr().err
    assert "weights-inception-2015-12-05-6726825d.pth" in err
    assert "--inception-weights" in err


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "--weights"),
        ("sample", "--run"),
        ("fid", "--reference", "images", "--run"),
        ("fid", "sweep", "--reference", "images", "--run"),
        ("fid", "--reference", "images", "--samples"),
        ("fid", "--samples", "samples", "--protocol", "digits", "--reference"),
        ("fid", "--samples", "samples", "--protocol", "digits", "--reference", "images", "--report"),
        ("fid", "stats", "images", "--protocol", "digits", "--out"),
        ("fid", "--samples", "samples", "--reference", "images", "--inception-weights"),
        ("train", "--recipe", "tiny", "--data", "latents.h5", *SMALL, *SHORT, "--out"),
        ("train", "--recipe", "tiny", "--data", "latents.h5", *SMALL, *SHORT, "--dry-run", "--out"),
        ("train", "--recipe", "tiny", "--data"),
        ("cache-latents", "--images", "images", "--recipe", "tiny", *SMALL, "--out"),
        ("cache-latents", "--recipe", "tiny", *SMALL, "--out", "new.h5", "--images"),
        ("quickstart", "--out"),
        ("weights", "info"),
    ],
)
def test_a_name_too_long_for_a_file(capsys, made, monkeypatch, command):
    monkeypatch.chdir(made)
    before = snapshot(made)
    assert "cannot be opened: File name too long" in refused(capsys, *command, "a" * 300)
    assert snapshot(made) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_name_too_long_for_an_export(capsys, made, suffix):
    out = made / ("a" * 300 + suffix)
    assert "cannot be opened: File name too long" in refused(capsys, "weights", "convert", made / "run", out)


@pytest.mark.parametrize(("key", "value"), [("labels", None), ("count", "4")])
def test_a_damaged_manifest_of_samples(capsys, work, key, value):
    path = work / "samples" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    error = refused(capsys, "sample", "--run", work / "run", "--count", "4", "--num-steps", "2", "--out", path.parent)
    assert "is damaged or not a manifest of samples" in error
