"""A run that is killed, told to stop, or short of disk goes on as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from torch.distributed.launcher.api import LaunchConfig

from tests.caches import PIXEL_OVERRIDES, N, make_cache
from tests.runs import SMALL, final_tensors, losses, settings, small_recipe
from tests.unit.train.test_bad_steps import poisoned_cache
from xar_cli.checkpoint import latest_checkpoint
from xar_cli.logs import read_metrics
from xar_cli.run_dir import RunDir
from xar_cli.train.loop import train

LONG = ("train.epochs=25", "train.checkpoint_every=9", "train.keep_every=36", "train.log_every=1")
STEPS = 116


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


def start(data, out, *options, **process):
    sets = [part for override in (*PIXEL_OVERRIDES, *SMALL, *LONG) for part in ("--set", override)]
    arguments = ("--data", str(data), "--out", str(out), "--device", "cpu", *sets, *options)
    return run_xar("train", "--recipe", "tiny", *arguments, **process)


def run_xar(*arguments, **process):
    command, environment = [sys.executable, "-m", "xar_cli", *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **process
    )


def wait_for_step(process, out, step, seconds=240):
    deadline = time.monotonic() + seconds
    while max([record["step"] for record in read_metrics(RunDir(out).metrics)], default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_stopped_after(error):
    return int(re.search(r"after step (\d+); a checkpoint is written", error)[1])


def same(out, expected):
    found, wanted = final_tensors(out), final_tensors(expected)
    return found.keys() == wanted.keys() and all(found[name].equal(tensor) for name, tensor in wanted.items())


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The same run on one rank without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(settings(small_recipe(*LONG), data, out))
    return out


def test_sigkill_then_sigterm_then_to_the_end(data, whole, tmp_path):
    out = tmp_path / "run"
    process = start(data, out)
    wait_for_step(process, out, 20)
    process.kill()
    process.communicate()
    process = start(data, out)
    wait_for_step(process, out, 40)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143
    stopped = steps_stopped_after(said)
    assert latest_checkpoint(RunDir(out)).step == stopped
    last = max(losses(out))
    assert last == stopped  # nothing was trained after the checkpoint
    train(settings(small_recipe(*LONG), data, out))
    assert same(out, whole)
    assert losses(out) == losses(whole)
    assert sorted(losses(out)) == list(range(1, STEPS + 1))
    kept = sorted(int(folder.name.removeprefix("step-")) for folder in RunDir(out).checkpoints.glob("step-*"))
    assert set(kept) == {36, 72, 108, 116}  # each 36th, and the last two
    assert not list(RunDir(out).checkpoints.glob(".*"))


def test_a_second_job_is_refused_while_the_first_lives(data, tmp_path):
    """By all of its ranks, and at once; looking at the run needs no lock, and a kill leaves none."""
    out = tmp_path / "run"
    first = start(data, out)
    try:
        wait_for_step(first, out, 3)
        os.kill(first.pid, signal.SIGSTOP)  # it lives, and cannot finish
        others = [start(data, out), start(data, out, "--nproc-per-node", "2")]
        look = [start(data, out, "--dry-run"), run_xar("status", str(out))]
        for other in others:
            said = other.communicate(timeout=120)[1]
            assert other.returncode == 2, said
            assert f"is being trained by process {first.pid} on {socket.gethostname()}" in said
            assert "Traceback" not in said
        for process in look:
            said = process.communicate(timeout=120)[1]
            assert process.returncode == 0, said
    finally:
        first.kill()
        first.communicate()
    train(settings(small_recipe(*LONG), data, out))
    assert sorted(losses(out)) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_all_ranks_stop_together(data, tmp_path, number, code):
    """The launcher passes the signal on; both ranks write one checkpoint after the same step."""
    out = tmp_path / "run"
    process = start(data, out, "--nproc-per-node", "2")
    wait_for_step(process, out, 5)
    process.send_signal(number)
    said = process.communicate(timeout=180)[1]
    assert process.returncode in (code, 143), said  # the launcher turns SIGUSR1 into SIGTERM
    assert latest_checkpoint(RunDir(out)).step == steps_stopped_after(said)
    assert "Traceback" not in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_in_a_terminal(data, tmp_path, ranks):
    """A terminal sends SIGINT to the launcher and to every rank, and the launcher passes its own on to them.

    Steps of many short operations: a rank notices both, where one long operation would let it see them as one.
    """
    out = tmp_path / "run"
    slow = ("--set", "model={dim: 64, depth: 8, heads: 4, dropout: 0.1}", "--set", "train.max_batch_per_rank=1")
    process = start(data, out, "--nproc-per-node", str(ranks), *slow, start_new_session=True)
    wait_for_step(process, out, 3)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 130, said
    assert latest_checkpoint(RunDir(out)).step == steps_stopped_after(said)
    assert "Traceback" not in said
    assert "leaked" not in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_that_closes_stops_the_run_with_a_checkpoint(data, tmp_path, ranks):
    out = tmp_path / "run"
    process = start(data, out, "--nproc-per-node", str(ranks), start_new_session=True)
    wait_for_step(process, out, 3)
    os.killpg(process.pid, signal.SIGHUP)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 129, said
    assert latest_checkpoint(RunDir(out)).step == steps_stopped_after(said)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nohup_lets_a_run_go_on(data, tmp_path, ranks):
    if ranks > 1 and "signals_to_handle" not in {field.name for field in fields(LaunchConfig)}:
        pytest.skip("this torch's launcher takes SIGHUP for itself")
    out = tmp_path / "run"
    process = start(
        data, out, "--nproc-per-node", str(ranks), start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as nohup does it
    )  # fmt: skip
    wait_for_step(process, out, 3)
    os.killpg(process.pid, signal.SIGHUP)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert max(losses(out)) == STEPS


def rank_of(process):
    """The process number of one of its ranks."""
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    return int(children.stdout.split()[-1])


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_nothing_is_restarted(data, tmp_path):
    out = tmp_path / "run"
    process = start(data, out, "--nproc-per-node", "2", "--max-restarts", "3")
    wait_for_step(process, out, 5)
    os.kill(rank_of(process), signal.SIGTERM)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 143, said
    assert latest_checkpoint(RunDir(out)).step == steps_stopped_after(said) == max(losses(out))
    assert "Going on with" not in said


@pytest.mark.slow
def test_too_many_bad_steps_are_not_tried_again(tmp_path):
    out, limit = tmp_path / "run", ("--set", "train.max_bad_steps=3", "--set", "train.checkpoint_every=1000")
    every_image = poisoned_cache(tmp_path / "latents.h5", list(range(N)))
    process = start(every_image, out, "--nproc-per-node", "2", "--max-restarts", "3", *limit)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 1, said
    assert said.count("not finite for 3 steps in a row, up to step 3") == 1
    assert latest_checkpoint(RunDir(out)).step == 3
    assert "Going on with" not in said


@pytest.mark.slow
def test_a_rank_killed_twice_is_restarted_and_nothing_differs(data, tmp_path):
    """SIGKILL on a worker: the launcher starts both again, from the newest checkpoint; two ranks, bit for bit."""
    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    process = start(data, out, "--nproc-per-node", "2", "--max-restarts", "1")
    wait_for_step(process, out, 20)
    os.kill(rank_of(process), signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    other = start(data, undisturbed, "--nproc-per-node", "2")
    assert other.wait(300) == 0
    assert same(out, undisturbed)
    assert losses(out) == losses(undisturbed)


def test_a_full_disk_does_not_end_the_run(data, whole, tmp_path, monkeypatch, caplog):
    """Checkpoints and records that cannot be written for a while: the run says so, goes on, and ends well."""
    from xar_cli import checkpoint
    from xar_cli.logs import MetricsWriter, log
    from xar_cli.train import loop

    monkeypatch.setattr(log, "propagate", True)
    out, save_file, write, take_step = (
        tmp_path / "run",
        checkpoint.write_safetensors,
        MetricsWriter.write,
        loop.take_step,
    )
    full = False

    def step(state, *rest):
        nonlocal full
        take_step(state, *rest)
        full = 30 < state.step < 70

    def save(tensors, path):
        if full:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    def write_record(self, **values):
        if full:
            raise OSError(28, "No space left on device")
        write(self, **values)

    monkeypatch.setattr(loop, "take_step", step)
    monkeypatch.setattr(checkpoint, "write_safetensors", save)
    monkeypatch.setattr(MetricsWriter, "write", write_record)
    assert train(settings(small_recipe(*LONG), data, out))["steps"] == STEPS
    assert "the older ones are intact" in caplog.text
    assert "A record could not be written" in caplog.text
    assert same(out, whole)
    assert losses(out) == losses(whole)  # no record is missing


def test_a_last_checkpoint_that_cannot_be_written_is_a_failure(data, tmp_path, monkeypatch):
    from xar_cli import checkpoint
    from xar_cli.errors import UserError

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(UserError, match="The checkpoint of step 10 could not be written") as caught:
        train(settings(small_recipe(), data, tmp_path / "run"))
    assert caught.value.exit_code == 1
