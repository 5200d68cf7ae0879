"""`xar sample` in real processes that are killed, run out of disk, or belong to somebody's torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.samples import ENVIRONMENT, command, pixels, small_weights
from xar_cli.sample.images import image_path, load_images

pytestmark = pytest.mark.slow
SLOW_STEPS = ("--num-steps", 40)  # seconds for some hundred images


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    return small_weights(tmp_path_factory.mktemp("weights"))


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )


def finish(arguments: list[str]) -> dict:
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(process: subprocess.Popen, path: Path) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_kill_leaves_nothing_that_the_same_command_does_not_put_right(weights, tmp_path):
    out, count = tmp_path / "s", 300
    again = command(*weights, "--count", count, *SLOW_STEPS, "--out", out, "--pack", "npz", "--json")
    process = start(again)
    wait_for(process, image_path(out, 20))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    whole = len(list(out.glob("*.png")))
    assert 0 < whole < count
    for name in ("000299", ".samples.npz"):  # what a kill in the middle of a write leaves
        (out / f"{name}.{process.pid}.tmp").write_bytes(b"part")
    assert finish(again)["made"] == count - whole
    assert {path.suffix for path in out.iterdir()} == {".png", ".json", ".npz"}
    assert len(list(load_images(out, range(count), (8, 8)))) == count


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, text=True
        )
        refusal = done.stderr.strip()
    except OSError as error:
        refusal = str(error)
    if not folder.is_mount():
        pytest.skip(f"a small file system cannot be mounted here: {refusal}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_two_processes_on_a_disk_that_becomes_full_keep_what_they_made(weights, small_disk, tmp_path):
    out, count = small_disk / "s", 400
    again = command(*weights, "--count", count, *SLOW_STEPS, "--out", out, "--nproc-per-node", 2, "--json")
    process = start(again)
    wait_for(process, image_path(out, 9))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "No space left on device" in said
    assert "the same command makes the rest" in " ".join(said.split())
    assert "Traceback" not in said
    there = sorted(int(path.stem) for path in out.glob("*.png"))
    assert 0 < len(there) < count
    kept = dict(zip(there, map(np.asarray, load_images(out, there, (8, 8))), strict=True))
    filler.unlink()
    assert finish(again)["made"] == count - len(there)
    found = pixels(out, count)
    assert all(np.array_equal(found[index], image) for index, image in kept.items())
    assert not list(out.glob("*.tmp"))
    finish(command(*weights, "--count", 20, *SLOW_STEPS, "--out", tmp_path / "other", "--json"))
    assert np.abs(found[:20].astype(int) - pixels(tmp_path / "other", 20)).max() <= 1


def fill(disk: Path, left: int) -> None:
    """Take all space of a disk but for `left` bytes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - left)


@pytest.mark.parametrize("pack", ["npz", "hdf5"])
def test_a_packed_file_on_a_disk_that_becomes_full_leaves_the_images_and_no_part_of_itself(weights, small_disk, pack):
    """The space of the pixels is there, and asked for; that of labels and manifest is not."""
    out, count = small_disk / "s", 400
    images = command(*weights, "--count", count, "--out", out, "--json")
    finish(images)
    fill(small_disk, left=(3 if pack == "npz" else 1) * count * 64 // 4096 * 4096 + 4096)
    done = subprocess.run([*images, "--pack", pack], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "the same command makes the rest" in " ".join(done.stderr.split())
    assert {path.suffix for path in out.iterdir()} == {".png", ".json"}
    (small_disk / "filler").unlink()
    made = finish([*images, "--pack", pack])
    assert made["made"] == 0
    if pack == "hdf5":
        with h5py.File(made[pack]) as file:
            assert np.array_equal(file["images"][..., 0], pixels(out, count))
            assert np.array_equal(file["labels"], json.loads((out / "manifest.json").read_text())["labels"])


def test_under_torchrun_the_first_process_alone_speaks_and_makes_the_grid(weights, tmp_path):
    out, grid = tmp_path / "s", tmp_path / "g.png"
    ours = command(*weights, "--grid", "6x4", "--save", grid, "--out", out, "--pack", "npz", "--json")[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0"]
    result = finish([*torchrun, *ours])  # one JSON object, not two
    assert (result["made"], result["count"], result["grid"]) == (24, 24, str(grid))
    expected = pixels(out, 24)
    picture = np.asarray(Image.open(grid).convert("L"))
    assert picture.shape == (4 * 66 + 2, 6 * 66 + 2)
    cells = picture[2:, 2:].reshape(4, 66, 6, 66).swapaxes(1, 2)[:, :, 4:64:8, 4:64:8]
    assert np.array_equal(cells.reshape(24, 8, 8), expected)
    explained = command(*weights, "--explain", tmp_path / "e.png", "--json")[1:]
    assert finish([*torchrun, *explained]) == {"picture": str(tmp_path / "e.png")}
