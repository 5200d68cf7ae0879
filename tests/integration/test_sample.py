"""`xar sample` as people use it: labels, restarts, packed files, grids, pictures, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter, namedtuple
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from tests.samples import ENVIRONMENT, command, pixels, refused, sample, small_config, small_weights, xar
from xar_cli.config.recipes import override
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.sample import stage
from xar_cli.sample.images import PngWriter, image_path
from xar_cli.sample.network import SamplingNetwork
from xar_cli.sample.noise import balanced_label
from xar_cli.tokenizer import Codec
from xar_cli.tokenizer.pixels import Pixels


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    return small_weights(tmp_path_factory.mktemp("weights"))


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


def test_packed_files_follow_the_count(capsys, weights, tmp_path):
    out, packs = tmp_path / "s", ("--pack", "npz", "--pack", "hdf5")
    first = sample(capsys, *weights, "--count", 20, "--out", out, *packs)
    sample(capsys, *weights, "--count", 30, "--out", out)
    with np.load(first["npz"]) as packed:
        assert len(packed["arr_0"]) == 20  # nobody asked for another one
    made = sample(capsys, *weights, "--count", 30, "--out", out, *packs)
    assert made["made"] == 0
    expected = pixels(out, 30)
    with np.load(made["npz"]) as packed, h5py.File(made["hdf5"]) as file:
        assert np.array_equal(packed["arr_0"][..., 0], expected)
        assert np.array_equal(file["images"][..., 0], expected)
        assert len(packed["arr_1"]) == len(file["labels"]) == 30
    times = [(out / name).stat().st_mtime_ns for name in ("samples.npz", "samples.h5")]
    sample(capsys, *weights, "--count", 30, "--out", out, *packs)
    assert [(out / name).stat().st_mtime_ns for name in ("samples.npz", "samples.h5")] == times
    (out / "samples.npz").write_bytes(b"PK damaged")
    sample(capsys, *weights, "--count", 30, "--out", out, *packs)
    with np.load(made["npz"]) as packed:
        assert len(packed["arr_0"]) == 30


def test_grid_decides_the_count(capsys, weights, tmp_path):
    grid = tmp_path / "pictures" / "grid.png"
    result = sample(capsys, *weights, "--class", "7,2", "--grid", "4x2", "--save", grid, "--out", tmp_path / "s")
    assert result["count"] == 8
    assert Image.open(grid).size == (4 * 66 + 2, 2 * 66 + 2)
    assert set(json.loads((tmp_path / "s" / "manifest.json").read_text())["labels"]) == {2, 7}


def test_a_finished_folder_gives_a_smaller_grid(capsys, weights, tmp_path):
    out, grid = tmp_path / "s", tmp_path / "grid.png"
    sample(capsys, *weights, "--count", 20, "--out", out)
    result = sample(capsys, *weights, "--grid", "5x2", "--save", grid, "--out", out)
    assert (result["made"], result["count"], result["grid"]) == (0, 20, str(grid))
    assert Image.open(grid).size == (5 * 66 + 2, 2 * 66 + 2)
    assert sample(capsys, *weights, "--out", out)["count"] == 64  # the default; more than are there
    assert sample(capsys, *weights, "--grid", "2x2", "--out", out)["grid"] == str(tmp_path / "s-grid.png")
    assert "count: 64 there, 10 here" in refused(capsys, *weights, "--count", 10, "--grid", "5x2", "--out", out)


def test_explain_makes_one_picture_and_nothing_else(capsys, weights, tmp_path):
    picture = tmp_path / "explained.png"
    result = sample(capsys, *weights, "--class", 3, "--explain", picture, "--num-steps", 4)
    assert result == {"picture": str(picture)}
    assert [path.name for path in tmp_path.iterdir()] == ["explained.png"]
    width, height = Image.open(picture).size
    assert width == 92 + 5 * 116  # t = 1, 0.75, 0.5, 0.25, 0
    assert height == 4 * (112 + 18 + 4)


def test_the_plan_of_explain_is_that_of_one_picture(capsys, weights, tmp_path):
    picture = tmp_path / "explained.png"
    plan = sample(capsys, *weights, "--class", "3,5", "--explain", picture, "--dry-run")
    assert plan["images"].startswith("1 of 8 x 8")
    assert plan["classes"] == str(balanced_label(0, 0, (3, 5)))
    assert plan["written to"] == str(picture)
    assert list(tmp_path.iterdir()) == []


def test_leading_zeros_make_no_octal_number(capsys, weights, tmp_path):
    plan = sample(capsys, *weights, "--num-steps", "010", "--out", tmp_path / "s", "--dry-run")
    assert "euler, 10 + 10 + 10 + 10 steps" in plan["solver"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_tasks_prints_the_plan(capsys, weights, tmp_path, monkeypatch, rank):
    job = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    for name, value in {**job, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    assert xar("sample", *weights, "--count", 20, "--out", tmp_path / "s", "--dry-run") == 0
    assert bool(capsys.readouterr().out) == (rank == 0)


def test_dry_run_writes_nothing(capsys, weights, tmp_path):
    plan = sample(capsys, *weights, "--count", 20, "--out", tmp_path / "s", "--dry-run", "--guidance-scale", 1)
    assert plan["network evaluations"] == "11 an image, 0 of them for guidance"
    assert not (tmp_path / "s").exists()


def test_plan_and_result_tell_the_chosen_classes(capsys, weights, tmp_path):
    chosen = [*weights, "--count", 2, "--class", "7,2-2", "--out", tmp_path / "s"]
    assert sample(capsys, *chosen, "--dry-run")["classes"] == sample(capsys, *chosen)["classes"] == "7, 2"


def test_the_plan_of_a_model_without_classes_names_neither_classes_nor_guidance(tmp_path):
    settings = stage.SampleSettings(
        config=override(small_config(), ["data.num_classes=0"]), weights="w", out=tmp_path, count=4, classes=(0,)
    )
    plan = dict(stage.describe_settings(settings))
    assert (plan["classes"], plan["guidance"]) == ("none", "none")


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
        (["--guidance-scale", "inf"], ["guidance_scale", "finite"]),
        (["--guidance-scale", "nan"], ["guidance_scale"]),
        (["--grid", "²x2"], ["COLUMNSxROWS"]),
        (["--save", "g.png"], ["--save", "--grid is missing"]),
        (["--grid", "5x2", "--save", "g"], ["--save g", "does not end as a picture does"]),
        (["--grid", "5x2", "--save", "g.txt"], ["does not end as a picture does", ".png"]),
        (["--grid", "5x2", "--save", "g" * 300 + ".png"], ["too long"]),
        (["--explain", "e"], ["--explain e", "does not end as a picture does"]),
        (["--guidance-interval", "0.9:0.1"], ["two rising numbers"]),
        (["--guidance-schedule", "steep"], ["guidance_schedule", "cosine"]),
        (["--pack", "npy"], ["Did you mean 'npz'?"]),
        (["--class", "11"], ["no class 11"]),
        (["--class", "²"], ["no class called '²'"]),
        (["--out", "x" * 300], ["cannot be a folder", "too long"]),
        (["--count", 10, "--out", "x" * 300], ["cannot be a folder", "too long"]),
    ],
)
def test_requests_that_make_no_sense(capsys, weights, tmp_path, arguments, words):
    error = refused(capsys, *weights, "--out", tmp_path / "s", *arguments)
    assert all(word in error for word in words), error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "unread",
    [
        ["--grid", "2x2"], ["--save", "g.png"], ["--pack", "npz"], ["--count", 1], ["--out", "s"],
        ["--nproc-per-node", 2], ["--nnodes", 2],
    ],
    ids=lambda unread: unread[0],
)  # fmt: skip
def test_explain_refuses_what_it_would_not_read(capsys, weights, tmp_path, unread):
    error = refused(capsys, *weights, "--explain", tmp_path / "e.png", *unread)
    assert f"--explain makes one picture of image 0 and does not read {unread[0]}." in error
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_written_are_refused_before_the_work(capsys, weights, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, words in ((tmp_path / "file" / "g.png", "Cannot write a picture"), (tmp_path / "folder.png", "a folder")):
        assert words in refused(capsys, *weights, "--grid", "5x2", "--save", path, "--out", tmp_path / "s")
        assert words in refused(capsys, *weights, "--explain", path)
    assert not (tmp_path / "s").exists()


def test_a_picture_that_fails_in_the_end_is_a_sentence(capsys, weights, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    error = refused(capsys, *weights, "--explain", tmp_path / "e.png", code=1)
    assert f"The picture '{tmp_path / 'e.png'}' could not be written" in error


def test_a_long_list_of_classes_makes_a_folder_name_that_fits(capsys, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ones, twos = ",".join(["3"] * 200), ",".join(["3"] * 199 + ["4"])
    folders = {sample(capsys, *weights, "--count", 3, "--class", text)["samples"] for text in (ones, twos, "3,4")}
    assert {str(path) for path in (tmp_path / "samples").iterdir()} == folders
    assert len(folders) == 3
    assert any(folder.endswith("-class3+4") for folder in folders)


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


def test_a_folder_is_completed_on_a_disk_with_room_for_what_is_missing(capsys, weights, tmp_path, monkeypatch):
    """20 of 22 images are there: 2 of at most 4,160 bytes are needed, and 22 x 192 for the packed file."""
    out, usage = tmp_path / "s", namedtuple("usage", "total used free")
    sample(capsys, *weights, "--count", 20, "--out", out)

    def free(size):
        monkeypatch.setattr("xar_cli.run_dir.shutil.disk_usage", lambda _: usage(0, 0, size))

    free(8319)
    assert "8.3 KB needed" in refused(capsys, *weights, "--count", 22, "--out", out)
    free(8320)
    assert "12.5 KB needed" in refused(capsys, *weights, "--count", 22, "--out", out, "--pack", "npz")
    assert sample(capsys, *weights, "--count", 22, "--out", out)["made"] == 2
    assert sample(capsys, *weights, "--count", 22, "--out", out, "--pack", "npz")["made"] == 0
    free(0)
    assert sample(capsys, *weights, "--count", 22, "--out", out, "--pack", "npz")["made"] == 0


def test_a_damaged_image_is_named_and_made_again(capsys, weights, tmp_path):
    out, grid = tmp_path / "s", tmp_path / "g.png"
    sample(capsys, *weights, "--count", 20, "--out", out)
    before = pixels(out, 20)

    def damage(*indices):
        for index in indices:
            path = image_path(out, index)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)

    for more in (["--pack", "npz"], ["--pack", "hdf5"], ["--grid", "10x2", "--save", grid]):
        damage(4, 17)
        error = refused(capsys, *weights, "--count", 20, "--out", out, *more, code=1)
        assert "have been removed: 000004.png, 000017.png. next: The same command makes them again." in error
        assert sample(capsys, *weights, "--count", 20, "--out", out, *more)["made"] == 2
        assert np.abs(pixels(out, 20).astype(int) - before).max() <= 1
    Image.new("L", (9, 9)).save(image_path(out, 1))
    (out / "samples.npz").unlink()
    assert "removed: 000001.png." in refused(capsys, *weights, "--count", 20, "--out", out, "--pack", "npz", code=1)


def test_what_a_kill_left_half_written_is_cleared_away(capsys, weights, tmp_path):
    out, dead = tmp_path / "s", subprocess.Popen(["true"])
    dead.wait()
    out.mkdir()
    (out / f".manifest.json.{dead.pid}.tmp").write_text("{")
    sample(capsys, *weights, "--count", 10, "--out", out)
    names = [f"000007.{dead.pid}.tmp", f".samples.npz.{dead.pid}.tmp", f".samples.h5.{dead.pid}.tmp"]
    for name in names:
        (out / name).write_bytes(b"part")
    other = subprocess.Popen(["sleep", "60"])
    try:
        (out / f"000008.{other.pid}.tmp").write_bytes(b"of a job that is at work")
        (out / "notes.1.tmp").write_text("not ours")
        sample(capsys, *weights, "--count", 10, "--out", out)
        assert {path.name for path in out.glob("*.tmp")} == {f"000008.{other.pid}.tmp", "notes.1.tmp"}
    finally:
        other.kill()
        other.wait()


def test_ctrl_c_never_breaks_into_the_handing_over_of_an_image(capsys, weights, tmp_path, monkeypatch):
    """There it could leave a thread waiting for ever. The batch in work, of 7 images, is still written."""
    real, handed = PngWriter.write, []

    def write(self, index, image):
        if len(handed) == 2:
            signal.raise_signal(signal.SIGINT)
        handed.append(index)
        real(self, index, image)

    with monkeypatch.context() as patch:
        patch.setattr(PngWriter, "write", write)
        assert xar("sample", *weights, "--count", 20, "--out", tmp_path / "out") == 130
    assert handed == list(range(7))
    assert sorted(int(path.stem) for path in (tmp_path / "out").glob("*.png")) == handed
    assert sample(capsys, *weights, "--count", 20, "--out", tmp_path / "out")["made"] == 13


def test_images_that_are_not_finite_end_the_work(capsys, tmp_path):
    weights = small_weights(tmp_path, fill=float("nan"))
    error = refused(capsys, *weights, "--count", 12, "--unbalanced", "--out", tmp_path / "s", code=1)
    assert "infinite or not a number: 0, 1, 2, 3, 4, 5, 6." in error
    assert "--set train.precision=bf16" in error
    assert not list((tmp_path / "s").glob("*.png"))
    advised = (*weights, "--count", 12, "--unbalanced", "--out", tmp_path / "s", "--set", "train.precision=bf16")
    assert "not a number" in refused(capsys, *advised, code=1)  # the folder takes other settings
    assert list((tmp_path / "s").iterdir()) == []
    assert "not a number: 0." in refused(capsys, *weights, "--explain", tmp_path / "e.png", code=1)


def test_a_folder_whose_images_are_still_to_come_is_taken(capsys, weights, tmp_path):
    """Another job may be compiling for them: its manifest is there, and counts."""
    sample(capsys, *weights, "--count", 10, "--out", tmp_path / "s")
    for image in (tmp_path / "s").glob("*.png"):
        image.unlink()
    other = (*weights, "--count", 10, "--out", tmp_path / "s", "--guidance-scale", 3)
    assert "guidance_scale: 2.0 there, 3.0 here" in refused(capsys, *other)


def test_only_a_preview_shows_what_is_not_finite():
    """A training run does not end at one."""
    config = small_config()
    model = XAR(config).eval()
    torch.nn.init.constant_(model.token_proj.weight, float("nan"))
    codec = Codec(Pixels(config.tokenizer.patch, 1), 1.0)
    arguments = (config, SamplingNetwork(model), codec, 0, [4, 7], [1, 2], torch.device("cpu"))
    with pytest.raises(UserError, match=r"not a number: 4, 7\.") as caught:
        stage.draw_images(*arguments)
    assert caught.value.exit_code == 1
    assert stage.draw_images(*arguments, must_be_finite=False).shape == (2, 1, 8, 8)


def test_a_decoder_of_narrow_range_is_suspected_first():
    """fp16 ends at 65,504: what the latents do not show may come from there."""

    class Codec:
        def decode(self, latents):
            return torch.full((len(latents), 3, 8, 8), float("inf"))

    small = override(small_config(), ["sample.decoder_precision=fp16"])
    network = SamplingNetwork(XAR(small).eval())
    init_weights(network.model, torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"not a number: 4\. Try `--set sample\.decoder_precision=fp32`, `--set train"):
        stage.draw_images(small, network, Codec(), 0, [4], [1], torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_takes_its_part_of_what_is_missing(capsys, weights, tmp_path, monkeypatch, rank):
    """Nine even numbers are missing: by the number itself, one of two processes would have nothing to do."""

    class Pair(Ranks):
        def on_main(self, compute):
            return compute()

        def gather(self, value):
            return [value] * 2

    @contextmanager
    def pair(device):
        yield Pair(rank, 0, 2, torch.device("cpu"))

    out, taken = tmp_path / "s", []
    sample(capsys, *weights, "--count", 20, "--out", out)
    for index in range(0, 18, 2):
        image_path(out, index).unlink()
    monkeypatch.setattr(stage, "process_group", pair)
    monkeypatch.setattr(stage, "_draw", lambda settings, labels, mine, *_: taken.extend(mine) or 0.0)
    capsys.readouterr()
    assert xar("sample", *weights, "--count", 20, "--out", out, "--json") == 0
    assert taken == list(range(2 * rank, 18, 4))
    told = capsys.readouterr().out
    assert bool(told) == (rank == 0)  # the first process speaks for all
    if told:
        result = json.loads(told)
        assert result["images_per_second"] * result["seconds"] == pytest.approx(9)


def test_images_do_not_depend_on_the_share_of_a_process(capsys, weights, tmp_path):
    """Latents of image 6, drawn in a batch of a process of four, equal those of one process, to 1e-4."""
    config = small_config()
    model = XAR(config).eval()
    init_weights(model, torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []

    class Codec:
        def decode(self, latents):
            seen.append(latents)
            return latents

    for indices in (list(range(8)), [2, 6]):
        stage.draw_images(
            config, SamplingNetwork(model), Codec(), 0, indices, [i % 10 for i in indices], torch.device("cpu")
        )
    torch.testing.assert_close(seen[1], seen[0][[2, 6]], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_four_processes_make_the_images_of_one(capsys, weights, tmp_path):
    sample(capsys, *weights, "--count", 30, "--out", tmp_path / "one")
    four = command(
        *weights, "--count", 30, "--out", tmp_path / "four", "--nproc-per-node", 4, "--pack", "npz", "--json"
    )
    done = subprocess.run(four, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["made"], result["count"]) == (30, 30)
    expected = pixels(tmp_path / "one", 30)
    assert np.abs(pixels(tmp_path / "four", 30).astype(int) - expected).max() <= 1
    with np.load(result["npz"]) as packed:
        assert packed["arr_0"].shape == (30, 8, 8, 3)
    one, four = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "four"))
    assert one == four
