"""`xar quickstart` as a person runs it, in its short form, as a real process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


def quickstart(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "xar_cli", "quickstart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_short_form_runs_through_reports_and_resumes(tmp_path):
    out = tmp_path / "quickstart"
    first = quickstart("--out", str(out), "--minutes", "0.2", "--json")
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 1
    result = json.loads(first.stdout)
    # A few seconds of training do not draw digits, but they must have moved away from the untrained network.
    assert 0 < result["frechet_floor"] < result["frechet_distance"] < result["frechet_ceiling"]
    assert 0 <= result["class_accuracy"] <= 1
    assert result["seconds"] > 0
    with Image.open(result["paths"]["grid"]) as grid:
        assert grid.width > 500
    assert len(list((out / "samples").glob("*.png"))) == 500

    # Finished: the result is said again, and nothing is made anew.
    again = quickstart("--out", str(out), "--json")
    assert json.loads(again.stdout) == result
    assert "holds a finished quickstart" in again.stderr

    # Wherever it is asked from, and called by another name.
    renamed = tmp_path / "called otherwise"
    renamed.symlink_to(out)
    elsewhere = json.loads(quickstart("--out", str(renamed), "--json").stdout)
    for name, path in elsewhere["paths"].items():
        assert path.startswith(str(renamed)), name
        assert Path(path).exists(), name
    next_command = quickstart("--out", str(renamed)).stdout.splitlines()[-1].removeprefix("Next: ")
    assert shlex.split(next_command)[:4] == ["xar", "sample", "--run", str(renamed / "run")]

    # Half of it lost: the rest is made again, and the samples of the same seed are the same.
    (out / "quickstart.json").unlink()
    kept = (out / "samples" / "000007.png").read_bytes()
    for path in list((out / "samples").glob("*.png"))[::2]:
        path.unlink()
    third = quickstart("--out", str(out), "--json")
    assert third.returncode == 0, third.stderr
    repeated = json.loads(third.stdout)
    assert (out / "samples" / "000007.png").read_bytes() == kept
    assert repeated["class_accuracy"] == result["class_accuracy"]
    assert repeated["frechet_distance"] == result["frechet_distance"]

    other = quickstart("--out", str(out), "--seed", "5")
    assert other.returncode == 2
    assert "holds a quickstart with seed 0" in other.stderr


def test_a_quickstart_is_one_process(tmp_path):
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = quickstart("--out", str(tmp_path / "out"), **job)
    assert done.returncode == 2
    assert "A quickstart is one process, and this one is rank 0 of 2" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("minutes", ["inf", "1e300"])
def test_no_length_of_time_is_a_sentence(tmp_path, minutes):
    done = quickstart("--out", str(tmp_path / "out"), "--minutes", minutes)
    assert done.returncode == 2
    assert "is no length of a quickstart" in done.stderr
    assert not (tmp_path / "out").exists()
