"""The command as a person types it: results on stdout, errors as a sentence, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.caches import PIXEL_OVERRIDES, make_images
from tests.distributed.ranks import free_ports
from xar_cli.cache.stage import summarize
from xar_cli.cli.app import main
from xar_cli.data.cache_file import CacheFile
from xar_cli.data.latents import LatentReader
from xar_cli.errors import UserError

SETTINGS = [part for override in (*PIXEL_OVERRIDES, "data.num_classes=3") for part in ("--set", override)]
COMMAND = [sys.executable, "-m", "xar_cli", "cache-latents"]


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def arguments(images, out, *more):
    return ["--images", str(images), "--out", str(out), "--recipe", "tiny", *SETTINGS, "--device", "cpu", *more]


@pytest.fixture
def xar(capsys):
    """Runs `xar cache-latents ...` in this process: exit code, stdout, stderr."""

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main(["cache-latents", *map(str, words)])
        return (caught.value.code, *capsys.readouterr())

    return run


def test_make_info_verify(images, tmp_path, xar):
    out = tmp_path / "latents.h5"
    code, printed, _ = xar(*arguments(images, out, "--json"))
    made = json.loads(printed)
    assert (code, made["num_samples"], made["num_missing"], made["path"]) == (0, 27, 0, str(out))
    code, printed, _ = xar("info", out, "--json")
    assert (code, json.loads(printed)["content_hash"]) == (0, made["content_hash"])
    code, printed, _ = xar("verify", out, "--recipe", "tiny", *SETTINGS, "--json")
    assert (code, json.loads(printed)["ok"]) == (0, True)
    for words in (("info", out), ("verify", out), arguments(images, out)):
        code, printed, _ = xar(*words)
        assert code == 0
        assert "pixels/p1" in printed or "num samples" in printed


def test_verify_of_a_damaged_cache_exits_with_1(images, tmp_path, xar):
    out = tmp_path / "latents.h5"
    xar(*arguments(images, out))
    place = CacheFile(out).shards[0].offsets["moments"] + 300
    with out.open("r+b") as file:
        file.seek(place)
        file.write(b"\xaa\xaa")
    code, printed, _ = xar("verify", out, "--json")
    assert (code, json.loads(printed)["checksum_errors"]) == (1, 1)


def test_dry_run_prints_the_plan_and_writes_nothing(images, tmp_path, xar):
    code, printed, _ = xar(*arguments(images, tmp_path / "new" / "latents.h5", "--dry-run", "--json"))
    plan = json.loads(printed)
    assert (code, plan["images"], plan["classes"], plan["grid"]) == (0, 27, 3, [8, 8])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_tasks_prints_the_plan(images, tmp_path, xar, monkeypatch, rank):
    job = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    for name, value in {**job, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    code, printed, _ = xar(*arguments(images, tmp_path / "latents.h5", "--dry-run", "--json"))
    assert (code, bool(printed)) == (0, rank == 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--set", "data.num_classes=4"], "--set data.num_classes=3"),
        (["--recipe", "tinny"], "tiny"),
        (["--flip", "enc"], "Did you mean 'encode'"),
        (["--images", "/nothing/here"], "no folder"),
        (["--max-bad", "-1"], "--max-bad"),
        (["--from-mar", "."], "one of them"),
        (["--nproc-per-node", "0"], "makes no job"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(images, tmp_path, xar, change, sentence):
    code, printed, error = xar(*arguments(images, tmp_path / "latents.h5", *change))
    assert (code, printed) == (2, "")
    assert sentence in error
    assert "next:" in error
    assert not (tmp_path / "latents.h5").exists()


def test_missing_options_are_named(images, tmp_path, xar):
    assert "--recipe is missing" in xar("--images", images, "--out", tmp_path / "x.h5")[2]
    assert "--out is missing" in xar("--images", images, "--recipe", "tiny")[2]


def test_bad_images_exit_with_1_and_are_skipped_on_demand(images, tmp_path, xar):
    (images / "class-1" / "004.png").write_bytes(b"\x89PNG")
    out = tmp_path / "latents.h5"
    code, _, error = xar(*arguments(images, out))
    assert code == 1
    assert "class-1/004.png" in error
    code, printed, _ = xar(*arguments(images, out, "--skip-bad", "--json"))
    assert (code, json.loads(printed)["num_bad"]) == (0, 1)
    assert "class-1/004.png" in (tmp_path / "latents.h5.bad.jsonl").read_text()


def test_two_real_ranks_make_one_cache_and_one_goes_on_from_it(images, tmp_path, xar):
    out, alone = tmp_path / "latents.h5", tmp_path / "alone.h5"
    kept = (images / "class-2" / "008.png").read_bytes()
    (images / "class-2" / "008.png").write_bytes(b"")
    ranks = [*COMMAND, *arguments(images, out, "--batch-size", "4", "--nproc-per-node", "2", "--json")]
    first = subprocess.run(ranks, capture_output=True, text=True)
    assert first.returncode == 1, first.stderr
    assert "class-2/008.png" in first.stderr
    assert summarize(out).num_missing >= 1
    assert len(list(tmp_path.glob("latents.shard-*.h5"))) == 2

    (images / "class-2" / "008.png").write_bytes(kept)
    xar(*arguments(images, out, "--batch-size", "4"))
    xar(*arguments(images, alone, "--batch-size", "4"))
    assert summarize(out).num_missing == 0
    assert summarize(out).content_hash == summarize(alone).content_hash


def test_several_ranks_set_no_more_aside_together_than_one(images, tmp_path, xar):
    for name in ("class-0/001.png", "class-2/008.png"):  # one for each of two ranks
        (images / name).write_bytes(b"")
    out = tmp_path / "latents.h5"
    ranks = [*COMMAND, *arguments(images, out, "--batch-size", "4", "--nproc-per-node", "2", "--json")]
    first = subprocess.run([*ranks, "--max-bad", "1"], capture_output=True, text=True)
    assert first.returncode == 1, first.stderr
    assert "2 images are bad, and 1 may be" in first.stderr
    assert (summarize(out).num_samples, summarize(out).num_missing) == (25, 0)
    second = subprocess.run([*ranks, "--max-bad", "2"], capture_output=True, text=True)
    assert (second.returncode, json.loads(second.stdout)["num_bad"]) == (0, 2), second.stderr


def test_under_srun_or_torchrun_the_first_rank_tells_of_what_all_have_made(images, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024), dtype=np.uint8)
    for path in (images / "class-2").iterdir():  # of rank 1, which so works longer
        Image.fromarray(noise).save(path)
    command = [*COMMAND, *arguments(images, tmp_path / "latents.h5", "--batch-size", "4", "--workers", "1", "--json")]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ended
    told = json.loads(ended[0][0])
    assert (told["num_samples"], told["num_missing"], ended[1][0]) == (27, 0, "")


def test_a_stopped_command_keeps_what_it_made(tmp_path):
    images, out = make_images(tmp_path / "images", 3, 700), tmp_path / "latents.h5"
    process = subprocess.Popen(
        [*COMMAND, *arguments(images, out, "--batch-size", "1", "--workers", "1")], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (out.exists() and CacheFile(out).checksums.any()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert 0 < summarize(out).num_samples < 2100
    with pytest.raises(UserError, match="not finished"):
        LatentReader(out)
