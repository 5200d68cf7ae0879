"""`xar fid` as a person runs it, on digits: one process, two, straight from a run, a sweep."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xar_cli import score_run
from xar_cli.cli.app import main
from xar_cli.data.digits import write_digits
from xar_cli.errors import UserError
from xar_cli.evaluate import evaluation, stage
from xar_cli.evaluate.features import extract
from xar_cli.sample.stage import draw_images

SMALL = ["--set", "model.dim=32", "--set", "model.depth=1", "--set", "model.heads=2"]
SHORT = ["--set", "train.global_batch_size=100", "--set", "train.epochs=0.2", "--set", "train.checkpoint_every=3"]


def xar(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return (caught.value.code, *capsys.readouterr())


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, Path]:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits) -> Path:
    """A run that was trained for three steps."""
    root = tmp_path_factory.mktemp("run")
    for command in (
        ["cache-latents", "--images", digits[1], "--out", root / "latents.h5", "--recipe", "tiny", *SMALL],
        ["train", "--recipe", "tiny", "--data", root / "latents.h5", "--out", root / "run", *SMALL, *SHORT],
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in command])
        assert caught.value.code == 0
    return root / "run"


def test_json_report_and_second_time_from_the_cache(capsys, digits, tmp_path) -> None:
    command = [
        "fid", "--samples", digits[1], "--reference", digits[0], "--protocol", "digits",
        "--report", tmp_path / "report", "--feature-cache", tmp_path / "cache", "--json",
    ]  # fmt: skip
    code, out, err = xar(capsys, *command)
    assert code == 0, err
    result = json.loads(out)
    metrics = result["protocols"]["digits"]["metrics"]
    assert metrics["fid"]["value"] == pytest.approx(0.7746, abs=0.01)
    assert metrics["class_accuracy"]["value"] >= 0.98
    for kind in ("json", "md", "html"):
        assert Path(result["report"][kind]).stat().st_size > 1000
    code, out, err = xar(capsys, *command)
    assert json.loads(out)["protocols"] == result["protocols"]
    assert "in the cache" in err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("An image went.", "")])
def test_a_report_that_fails_costs_no_number(capsys, digits, tmp_path, monkeypatch, error) -> None:
    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(stage, "write_report", fail)
    code, out, err = xar(
        capsys, "fid", "--samples", digits[1], "--reference", digits[1], "--protocol", "digits", "--no-feature-cache",
        "--error-bars", "none", "--report", tmp_path / "report", "--json",
    )  # fmt: skip
    assert code == 1
    assert json.loads(out)["protocols"]["digits"]["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-6)
    said = " ".join(err.split())
    assert "report' is not whole: " in said
    assert ("No space left" in said) or ("An image went." in said)


def test_table_names_protocol_and_count(capsys, digits) -> None:
    code, out, _ = xar(
        capsys, "fid", "--samples", digits[1], "--reference", digits[0], "--protocol", "digits", "--no-feature-cache",
        "--error-bars", "none",
    )  # fmt: skip
    assert code == 0
    assert "Frechet distance (297 images)" in out
    assert "digits" in out


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("8x12", "has 8 x 12 pixels (height x width) where 8 x 8 are expected"),
        ("8by8", "'--image-size 8by8' is neither SIDE nor HEIGHTxWIDTH"),
        ("0", "'--image-size 0' is neither"),
        ("²", "'--image-size ²' is neither"),
    ],
)
def test_an_image_size_is_a_side_or_height_and_width(capsys, digits, size, words) -> None:
    code, _, err = xar(
        capsys, "fid", "--samples", digits[1], "--reference", digits[0], "--protocol", "digits", "--no-feature-cache",
        "--image-size", size,
    )  # fmt: skip
    assert code == 2
    assert words in " ".join(err.split())


def test_stats_then_fid(capsys, digits, tmp_path) -> None:
    code, out, err = xar(
        capsys,
        "fid",
        "stats",
        digits[0],
        "-o",
        tmp_path / "ref.npz",
        "--protocol",
        "digits",
        "--no-feature-cache",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["count"] == 1500
    code, out, _ = xar(
        capsys, "fid", "--samples", digits[1], "--reference", tmp_path / "ref.npz", "--protocol", "digits", "--json",
        "--no-feature-cache",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["protocols"]["digits"]["metrics"]["fid"]["value"] == pytest.approx(0.7746, abs=0.01)


def test_one_protocol_is_one_protocol(capsys, run, digits, tmp_path) -> None:
    stats = ["fid", "stats", digits[0], "-o", tmp_path / "ref.npz"]
    sweep = ["fid", "sweep", "--run", run, "--reference", digits[0], "--out", tmp_path / "sweep"]
    for command in (stats, sweep):
        code, out, err = xar(capsys, *command, "--protocol", "digits,adm")
        assert (code, out) == (2, "")
        assert "One protocol is needed, not 2 (digits, adm)" in " ".join(err.split())


@pytest.mark.parametrize("rank", [0, 1])
def test_doctor_speaks_once_in_a_job_of_two(capsys, monkeypatch, rank: int) -> None:
    job = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    for name, value in {**job, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    code, out, err = xar(capsys, "fid", "doctor")
    assert code == 0, err
    assert ("digits: can run." in out) == (rank == 0)


def test_doctor(capsys) -> None:
    code, out, _ = xar(capsys, "fid", "doctor", "--json")
    assert code == 0
    assert json.loads(out)["digits"]["runs"] is True
    code, out, _ = xar(capsys, "fid", "doctor")
    assert "digits: can run." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "x"], "One set of samples"),
        (["--samples", "x", "--run", "y", "--reference", "z"], "One set of samples"),
        (["--samples", "x"], "--reference is missing"),
        (["--samples", "absent", "--reference", "absent", "--protocol", "digits"], "nothing at"),
        (["--samples", "x", "--reference", "y", "--precision", "fp8"], "--precision"),
        (["--samples", "x", "--reference", "y", "--protocol", "dgits"], "no protocol 'dgits'"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(capsys, tmp_path, monkeypatch, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = xar(capsys, "fid", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "\n  next: " in err
    assert list(tmp_path.iterdir()) == []


def test_images_of_a_run_are_judged_without_writing_them(capsys, run, digits, tmp_path) -> None:
    before = sorted(run.rglob("*"))
    common = ["--reference", digits[0], "--no-feature-cache", "--error-bars", "none", "--json"]
    code, out, err = xar(capsys, "fid", "--run", run, "--count", 30, "--report", tmp_path / "report", *common)
    assert code == 0, err
    direct = json.loads(out)
    assert sorted(run.rglob("*")) == before
    assert direct["samples"]["count"] == 30
    assert list(direct["protocols"]) == ["digits"]  # the recipe's
    assert json.loads((tmp_path / "report" / "report.json").read_text())["sampling"]["recipe"] == "tiny"
    # The same images by way of files.
    assert xar(capsys, "sample", "--run", run, "--count", 30, "--out", tmp_path / "samples")[0] == 0
    code, out, err = xar(capsys, "fid", "--samples", tmp_path / "samples", "--protocol", "digits", *common)
    assert code == 0, err
    for key, metric in json.loads(out)["protocols"]["digits"]["metrics"].items():
        assert metric["value"] == pytest.approx(direct["protocols"]["digits"]["metrics"][key]["value"], rel=1e-3), key


@pytest.fixture
def draws(monkeypatch) -> list[int]:
    """How many images each batch of a run has drawn."""
    counted: list[int] = []

    def draw(config, network, codec, seed, indices, *rest):
        counted.append(len(indices))
        return draw_images(config, network, codec, seed, indices, *rest)

    monkeypatch.setattr(score_run, "draw_images", draw)
    return counted


def test_images_of_a_run_are_drawn_in_batches_of_the_recipe_or_of_the_option(
    capsys, run, digits, draws, tmp_path
) -> None:
    """Those of the report too: two of each class in eight batches, then eight beside their nearest real images."""
    common = ["--run", run, "--count", 20, "--reference", digits[0], "--no-feature-cache", "--error-bars", "none"]
    assert xar(capsys, "fid", *common)[0] == 0
    assert draws == [20]  # the recipe's 250 are more
    draws.clear()
    code, _, err = xar(capsys, "fid", *common, "--batch-size", 6, "--report", tmp_path / "report", "--json")
    assert code == 0, err
    assert draws == [6, 6, 6, 2, *(6, 6, 6, 2), *(6, 2)]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["settings"]["batch_size"] == 6
    assert report["cost"]["total_per_image"] == sum(report["cost"][key] for key in ("conditional", "null", "commits"))


def test_sweep_scores_draws_and_resumes(capsys, run, digits, draws, tmp_path, monkeypatch) -> None:
    extracted = []

    def noted(images, *arguments, **options):
        extracted.append(images)
        return extract(images, *arguments, **options)

    monkeypatch.setattr(evaluation, "extract", noted)
    command = [
        "fid", "sweep", "--run", run, "--reference", digits[0], "--guidance-scale", "1:2:1", "--num-steps", "2",
        "--count", 20, "--out", tmp_path / "sweep", "--no-feature-cache", "--json",
    ]  # fmt: skip
    code, out, err = xar(capsys, *command)
    assert code == 0, err
    result = json.loads(out)
    assert [point["point"]["guidance_scale"] for point in result["points"]] == [1.0, 2.0]
    assert draws == [20, 20, 20]  # the first one warms up
    assert [images.generated for images in extracted] == [True, False, True]  # the reference once
    assert all(point["images_per_second"] > 0 and point["error"] > 0 for point in result["points"])
    assert Path(result["plot"]).is_file()
    code, out, err = xar(capsys, *command)
    assert json.loads(out) == result
    assert "2 of 2 points are done" in err
    assert len(draws) == 3


@pytest.mark.parametrize(("option", "wrong"), [("--num-steps", "2,4:3:2"), ("--guidance-scale", "1,-1")])
def test_a_wrong_point_is_refused_before_the_first_is_drawn(
    capsys, run, digits, draws, tmp_path, option, wrong
) -> None:
    points = {"--guidance-scale": "1", "--num-steps": "2", option: wrong}
    code, _, err = xar(
        capsys, "fid", "sweep", "--run", run, "--reference", digits[0], "--count", 20, "--out", tmp_path / "sweep",
        "--no-feature-cache", *(word for pair in points.items() for word in pair),
    )  # fmt: skip
    assert code == 2
    assert "sample." in err
    assert draws == []
    assert not (tmp_path / "sweep").exists()


def test_statistics_of_another_network_are_refused_before_a_sweep_draws(capsys, run, digits, draws, tmp_path) -> None:
    reference = tmp_path / "reference.npz"
    assert xar(capsys, "fid", "stats", digits[0], "-o", reference, "--protocol", "digits", "--no-feature-cache")[0] == 0
    arrays = dict(np.load(reference))
    arrays["xar"] = np.array(str(arrays["xar"]).replace('"weights_sha256": "', '"weights_sha256": "0'))
    np.savez(reference, **arrays)
    code, _, err = xar(
        capsys, "fid", "sweep", "--run", run, "--reference", reference, "--count", 20, "--out", tmp_path / "sweep",
        "--no-feature-cache",
    )  # fmt: skip
    assert code == 2
    assert "was made with other weights" in " ".join(err.split())
    assert draws == []


@pytest.mark.parametrize("option", [("--seed", 1), ("--tokenizer-weights", "kl16.ckpt")])
def test_options_of_drawing_are_refused_beside_images_that_exist(capsys, digits, option) -> None:
    code, _, err = xar(capsys, "fid", "--samples", digits[1], "--reference", digits[0], "--protocol", "digits", *option)
    assert code == 2
    assert f"{option[0]} would not be read" in " ".join(err.split())


def test_a_sweep_is_not_continued_against_other_images_of_the_same_name(capsys, run, digits, tmp_path) -> None:
    reference = Path(shutil.copytree(digits[0], tmp_path / "real"))
    command = [
        "fid", "sweep", "--run", run, "--reference", reference, "--guidance-scale", "1", "--num-steps", "2",
        "--count", 20, "--out", tmp_path / "sweep", "--no-feature-cache",
    ]  # fmt: skip
    (tmp_path / "linked").symlink_to(reference)
    assert xar(capsys, *command)[0] == 0
    identity = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert identity["reference"] == str(reference)  # the same images by another path go on
    code, _, err = xar(capsys, *[tmp_path / "linked" if word == reference else word for word in command])
    assert (code, "1 of 1 points are done" in err) == (0, True)
    assert identity["tokenizer"].startswith("pixels")
    assert len(identity["reference_sha256"]) == len(identity["network_weights"]["digits"]) == 64
    next(reference.rglob("*.png")).unlink()
    code, _, err = xar(capsys, *command)
    assert code == 2
    assert "holds a sweep with another reference_sha256" in " ".join(err.split())


@pytest.mark.slow
def test_two_ranks_give_the_number_of_one(run, digits, tmp_path) -> None:
    def judge(ranks: int, *arguments: object) -> dict:
        command = [
            sys.executable, "-m", "xar_cli", "fid", "--reference", digits[0], "--protocol", "digits",
            "--no-feature-cache", "--device", "cpu", "--nproc-per-node", ranks, "--batch-size", 16, "--json",
            *arguments,
        ]  # fmt: skip
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
        return json.loads(done.stdout)["protocols"]["digits"]["metrics"]

    for source in (("--samples", digits[1]), ("--run", run, "--count", 25)):
        one, two = judge(1, *source), judge(2, *source)
        assert one.keys() == two.keys()
        for key in one:
            assert two[key]["value"] == pytest.approx(one[key]["value"], rel=1e-6), (source, key)


@pytest.mark.slow
def test_statistics_by_two_ranks_of_a_job_are_told_once(digits, tmp_path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "xar_cli", "fid",
        "stats", str(digits[1]), "-o", str(tmp_path / "ref.npz"), "--protocol", "digits", "--device", "cpu",
        "--no-feature-cache", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["count"] == 297


@pytest.mark.slow
def test_a_bad_image_on_one_of_two_ranks_ends_both_with_its_name(digits, tmp_path) -> None:
    samples = Path(shutil.copytree(digits[1], tmp_path / "samples"))
    last = sorted(samples.rglob("*.png"))[-1]
    last.write_bytes(b"\x89PNG not really")
    done = subprocess.run(
        [sys.executable, "-m", "xar_cli", "fid", "--samples", str(samples), "--reference", str(digits[0]), "--protocol",
         "digits", "--no-feature-cache", "--device", "cpu", "--nproc-per-node", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    error, step = done.stderr.strip().splitlines()[-2:]  # after what torch's launcher has to say
    assert error.startswith("error: ")
    assert last.name in error
    assert "--skip-bad" in step
