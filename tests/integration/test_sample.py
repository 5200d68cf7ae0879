"""`xar sample` as people use it: labels, restarts, packed files, grids, pictures, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from xar_cli.cli.app import main
from xar_cli.config import dump_config
from xar_cli.config.recipes import load_recipe
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.sample import stage
from xar_cli.sample.images import PngWriter, image_path

OVERRIDES = ["model={dim: 16, depth: 1, heads: 2}", "sample.num_steps=2", "sample.batch_size=7"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    """Options that name an untrained network, so small that an image takes a millisecond."""
    folder = tmp_path_factory.mktemp("weights")
    config = load_recipe("tiny", OVERRIDES)
    model = XAR(config)
    init_weights(model, torch.Generator().manual_seed(0))
    save_file(dict(model.named_parameters()), folder / "small.safetensors")
    (folder / "small.yaml").write_text(dump_config(config))
    return ["--weights", str(folder / "small.safetensors"), "--recipe", str(folder / "small.yaml")]


def xar(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def sample(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert xar("sample", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object, code: int = 2) -> str:
    capsys.readouterr()
    assert xar("sample", *arguments) == code
    return capsys.readouterr().err


def pixels(folder: Path, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(image_path(folder, index))) for index in range(count)])


def test_a_restart_makes_only_what_is_missing_and_the_same_images(capsys, weights, tmp_path):
    out = tmp_path / "samples"
    first = sample(capsys, *weights, "--count", 23, "--out", out)
    assert (first["made"], first["count"]) == (23, 23)
    assert "batch 7" in first["measured_with"]
    assert (
        "14 network evaluations an image (8 with its class, 6 for guidance, 6 for context)".replace("14", "20")
        in (first["measured_with"])
    )
    before = pixels(out, 23)
    image_path(out, 3).unlink()
    torn = image_path(out, 8)
    torn.write_bytes(torn.read_bytes()[:-5])
    kept = image_path(out, 9).stat().st_mtime_ns
    assert sample(capsys, *weights, "--count", 23, "--out", out)["made"] == 2
    assert np.abs(pixels(out, 23).astype(int) - before).max() <= 1
    assert image_path(out, 9).stat().st_mtime_ns == kept
    assert sample(capsys, *weights, "--count", 23, "--out", out)["made"] == 0
    assert sample(capsys, *weights, "--count", 30, "--out", out)["made"] == 7
    assert not list(out.glob("*.tmp"))


def test_manifest_tells_labels_and_settings(capsys, weights, tmp_path):
    sample(
        capsys, *weights, "--count", 40, "--seed", 5, "--out", tmp_path / "s", "--num-steps", "4:1", "--solver", "heun"
    )
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert Counter(manifest["labels"]) == dict.fromkeys(range(10), 4)
    assert (manifest["seed"], manifest["solver"], manifest["num_steps"]) == (5, "heun", [4, 3, 2, 1])
    assert len(manifest["weights_sha256"]) == 64


def test_one_npz_as_adm_has_it_and_one_hdf5(capsys, weights, tmp_path):
    result = sample(capsys, *weights, "--count", 20, "--out", tmp_path / "s", "--pack", "npz", "--pack", "hdf5")
    expected = pixels(tmp_path / "s", 20)
    labels = json.loads((tmp_path / "s" / "manifest.json").read_text())["labels"]
    with np.load(result["npz"]) as packed:
        assert packed["arr_0"].shape == (20, 8, 8, 3)
        assert packed["arr_0"].dtype == np.uint8
        assert np.array_equal(packed["arr_0"], np.repeat(expected[..., None], 3, axis=3))
        assert packed["arr_1"].tolist() == labels
    with h5py.File(result["hdf5"]) as file:
        assert np.array_equal(file["images"][..., 0], expected)
        assert file["labels"][:].tolist() == labels
        assert json.loads(file.attrs["manifest"])["count"] == 20


def test_grid_decides_the_count(capsys, weights, tmp_path):
    grid = tmp_path / "pictures" / "grid.png"
    result = sample(capsys, *weights, "--class", "7,2", "--grid", "4x2", "--save", grid, "--out", tmp_path / "s")
    assert result["count"] == 8
    assert Image.open(grid).size == (4 * 66 + 2, 2 * 66 + 2)
    assert set(json.loads((tmp_path / "s" / "manifest.json").read_text())["labels"]) == {2, 7}


def test_explain_makes_one_picture_and_nothing_else(capsys, weights, tmp_path):
    picture = tmp_path / "explained.png"
    result = sample(capsys, *weights, "--class", 3, "--explain", picture, "--num-steps", 4)
    assert result == {"picture": str(picture)}
    assert [path.name for path in tmp_path.iterdir()] == ["explained.png"]
    width, height = Image.open(picture).size
    assert width == 92 + 5 * 116  # t = 1, 0.75, 0.5, 0.25, 0
    assert height == 4 * (112 + 18 + 4)


def test_dry_run_writes_nothing(capsys, weights, tmp_path):
    plan = sample(capsys, *weights, "--count", 20, "--out", tmp_path / "s", "--dry-run", "--guidance-scale", 1)
    assert plan["network evaluations"] == "11 an image, 0 of them for guidance"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", 9], ["9 images cannot be balanced over 10 classes", "--unbalanced"]),
        (["--count", 30, "--grid", "8x4"], ["30 images do not fill a grid of 8 x 4"]),
        (["--count", 48, "--grid", "8x4"], ["48 images do not fill"]),
        (["--grid", "8by4"], ["COLUMNSxROWS"]),
        (["--num-steps", "40:"], ["num_steps", "40:15"]),
        (["--num-steps", "2001"], ["num_steps", "1000"]),
        (["--solver", "euler_maruyama", "--num-steps", 1], ["2 or more"]),
        (["--solver", "eler"], ["sample.solver", "multistep"]),
        (["--guidance-scale", "-0.5"], ["guidance_scale"]),
        (["--guidance-interval", "0.9:0.1"], ["two rising numbers"]),
        (["--guidance-schedule", "steep"], ["guidance_schedule", "cosine"]),
        (["--pack", "npy"], ["Did you mean 'npz'?"]),
        (["--class", "11"], ["no class 11"]),
    ],
)
def test_requests_that_make_no_sense(capsys, weights, tmp_path, arguments, words):
    error = refused(capsys, *weights, *arguments, "--out", tmp_path / "s")
    assert all(word in " ".join(error.split()) for word in words), error
    assert not (tmp_path / "s").exists()


def test_fewer_images_than_classes_where_one_says_so(capsys, weights, tmp_path):
    assert sample(capsys, *weights, "--count", 3, "--unbalanced", "--out", tmp_path / "s")["count"] == 3


def test_a_folder_made_with_other_settings_lists_the_differences(capsys, weights, tmp_path):
    out = tmp_path / "s"
    sample(capsys, *weights, "--count", 12, "--out", out)
    error = " ".join(refused(capsys, *weights, "--count", 10, "--seed", 1, "--num-steps", 3, "--out", out).split())
    for difference in ("seed: 0 there, 1 here", "num_steps: 2 there, 3 here", "count: 12 there, 10 here"):
        assert difference in error
    assert "other classes" in refused(capsys, *weights, "--count", 12, "--class", "0-3", "--out", out)
    (out / "manifest.json").write_text("{")
    assert "damaged" in refused(capsys, *weights, "--count", 12, "--out", out)


def test_a_full_disk_keeps_what_was_made(capsys, weights, tmp_path, monkeypatch):
    out, save = tmp_path / "s", PngWriter._save

    def full(self, index, image):
        if index >= 10:
            raise OSError(28, "No space left on device")
        save(self, index, image)

    monkeypatch.setattr(PngWriter, "_save", full)
    error = refused(capsys, *weights, "--count", 20, "--out", out, code=1)
    assert "No space left" in error
    assert "the same command makes the rest" in " ".join(error.split())
    monkeypatch.undo()
    made = sample(capsys, *weights, "--count", 20, "--out", out)["made"]
    assert 10 <= made <= 13


def test_images_do_not_depend_on_the_share_of_a_process(capsys, weights, tmp_path):
    """Latents of image 6, drawn in a batch of a process of four, equal those of one process, to 1e-4."""
    config = load_recipe("tiny", OVERRIDES)
    model = XAR(config).eval()
    init_weights(model, torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}

    class Codec:
        def images(self, latents):
            return latents

    for name, indices in (("one", list(range(8))), ("four", [2, 6])):
        seen[name] = stage.draw_images(
            config, model, Codec(), 0, indices, [i % 10 for i in indices], torch.device("cpu")
        )
    torch.testing.assert_close(seen["four"], seen["one"][[2, 6]], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_four_processes_make_the_images_of_one(capsys, weights, tmp_path):
    sample(capsys, *weights, "--count", 30, "--out", tmp_path / "one")
    command = [
        sys.executable, "-m", "xar_cli", "sample", *weights, "--count", "30", "--out", str(tmp_path / "four"),
        "--nproc-per-node", "4", "--pack", "npz", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["made"], result["count"]) == (30, 30)
    expected = pixels(tmp_path / "one", 30)
    assert np.abs(pixels(tmp_path / "four", 30).astype(int) - expected).max() <= 1
    with np.load(result["npz"]) as packed:
        assert packed["arr_0"].shape == (30, 8, 8, 3)
    one, four = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "four"))
    assert one == four
