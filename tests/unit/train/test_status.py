import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.runs import small_recipe
from xar_cli.cli.app import app
from xar_cli.config import dump_config
from xar_cli.errors import UserError
from xar_cli.logs import MetricsWriter
from xar_cli.run_dir import RunDir, write_json
from xar_cli.train import status
from xar_cli.train.status import find_worries, noted_state, run_status


def records(count, **changes):
    """Records of a healthy run: the loss falls a little, with noise."""
    values = {
        "grad_norm": lambda i: 1.0,
        "images_per_second": lambda i: 100.0,
        "loss": lambda i: 2 - 0.01 * i + 0.02 * (i % 2),
    }
    values |= changes
    return [
        {
            "step": 10 * (i + 1),
            "lr": 1e-3,
            "skipped_steps": 0,
            "time": 1000.0 + 5 * i,
            "seconds_left": 60.0,
            "epoch": 0.5,
        }
        | {key: value(i) for key, value in values.items()}
        for i in range(count)
    ]


def make_run(root, written, total=1000):
    run = RunDir(root)
    writer = MetricsWriter(run.metrics)
    for record in written:
        writer.write(**record)
    writer.close()
    run.config.write_text(dump_config(small_recipe()))
    run.identity.write_text(json.dumps({"plan": {"total_steps": total}}))
    return run


def test_healthy():
    assert find_worries(small_recipe(), records(60)) == []
    assert find_worries(small_recipe(), records(5)) == []


@pytest.mark.parametrize(
    ("changes", "worry"),
    [
        ({"loss": lambda i: 1 + 0.02 * (i % 2) + (0.3 if i >= 40 else 0)}, "the loss is rising"),
        ({"grad_norm": lambda i: 5.0 if i >= 40 else 1.0}, "gradients are growing"),
        (
            {"images_per_second": lambda i: 50.0 if i >= 40 else 100.0},
            "it has become slow: 100 images/s before, 50 now",
        ),
        ({"skipped_steps": lambda i: int(i == 59)}, "1 of the last steps were skipped"),
    ],
)
def test_worries(changes, worry):
    (found,) = find_worries(small_recipe(), records(60, **changes))
    assert worry in found


def test_fp16_may_skip_now_and_then():
    written = records(60, skipped_steps=lambda i: int(i == 59))
    assert find_worries(small_recipe("train.precision=fp16"), written) == []


def note(run, state, when, why="", patience=120.0):
    write_json(run.status, {"state": state, "step": 300, "why": why, "time": when, "patience": patience})


def test_a_run_without_a_note_goes_by_its_records(tmp_path):
    """As one of version 0.1.0."""
    run = make_run(tmp_path / "a", records(30))
    assert run_status(run, now=1150).state == "running"
    late = run_status(run, now=9000)
    assert late.state == "stopped"
    assert not late.healthy
    done = make_run(tmp_path / "b", records(30), total=300)
    assert run_status(done, now=9000).state == "stopped"  # its last checkpoint is not there
    (done.checkpoints / "step-00000300").mkdir(parents=True)
    assert run_status(done, now=9000).state == "finished"
    assert run_status(make_run(tmp_path / "c", []), now=0).state == "not started"


def test_a_note_and_its_age(tmp_path):
    run = make_run(tmp_path / "run", records(30))
    note(run, "running", 5000)
    assert run_status(run, now=5100).state == "running"
    assert run_status(run, now=5200).state == "stopped"
    note(run, "drawing", 5000, patience=3600.0)
    assert run_status(run, now=8000).state == "drawing"
    assert run_status(run, now=9000).state == "stopped"
    note(run, "running", 5000, patience=1060.0)  # its steps take long, and its records come from earlier
    assert run_status(run, now=6000).state == "running"
    slow = make_run(tmp_path / "slow", [record | {"time": 60.0 * i} for i, record in enumerate(records(5))])
    note(slow, "running", 240.0)
    assert run_status(slow, now=800.0).state == "running"  # ten times what is usual between records
    assert run_status(slow, now=900.0).state == "stopped"


@pytest.mark.parametrize(("seconds", "patience"), [(1.0, 120.0), (300.0, 3060.0)])
def test_a_run_says_for_how_long_it_may_be_silent(tmp_path, monkeypatch, seconds, patience):
    """The first step compiles and tells nothing of those after it; a preview belongs to no step."""
    run, clock, counter = RunDir(tmp_path), [0.0], SimpleNamespace(step=0)
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])

    def noted(key):
        return json.loads(run.status.read_text())[key]

    def take_step(duration):
        clock[0] += duration
        counter.step += 1
        note.step_taken()

    with noted_state(run, counter, enabled=True) as note:
        assert noted("patience") == status.STARTING_SECONDS
        take_step(900.0)
        take_step(seconds)
        assert (noted("step"), noted("patience")) == (2, patience)  # as soon as it is known how long a step takes
        for _ in range(round(70 / seconds) + 1):
            take_step(seconds)
        assert (noted("state"), noted("patience")) == ("running", patience)
        assert noted("step") > 1
        note.write("drawing")
        assert noted("patience") == status.PAUSE_SECONDS
        clock[0] += 1000.0
        note.write("running")
        take_step(seconds)
        assert noted("patience") == patience


@pytest.mark.parametrize("name", ["step-00000300-backup", "step-new", ".step-00000300.tmp"])
def test_other_folders_beside_the_checkpoints(tmp_path, name):
    run = make_run(tmp_path / "run", records(30))
    for folder in ("step-00000200", name):
        (run.checkpoints / folder).mkdir(parents=True)
    assert run_status(run, now=1150).checkpoint_step == 200


def test_damaged_files(tmp_path):
    run = make_run(tmp_path / "run", records(30))
    run.metrics.write_bytes(run.metrics.read_bytes() + b"\0\0\0\n[1, 2]\n")
    write_json(run.status, {"state": "failed"})
    found = run_status(run, now=1150)
    assert (found.step, found.state) == (300, "failed")
    run.identity.write_text("{")
    run.checkpoints.write_text("a file in their place")
    found = run_status(run, now=1150)
    assert (found.step, found.total_steps, found.checkpoint_step) == (300, None, None)
    assert "run.json' is damaged" in found.worries[0]
    assert "checkpoints cannot be read" in found.worries[1]


def test_a_run_that_died_before_its_first_record(tmp_path):
    run = make_run(tmp_path / "run", [])
    note(run, "running", 5000)
    assert run_status(run, now=5001).state == "running"
    assert not run_status(run, now=6000).healthy


def test_a_note_says_why_a_run_ended(tmp_path):
    run = make_run(tmp_path / "run", records(30))
    note(run, "failed", 5000, "The disk is full.")
    found = run_status(run, now=5001)
    assert (found.state, found.healthy) == ("failed", False)
    assert found.worries == ["it ended after step 300: The disk is full."]
    note(run, "finished", 5000)
    found = run_status(run, now=9000)
    assert (found.state, found.healthy) == ("finished", True)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "finished"),
        (KeyboardInterrupt(), "stopped"),
        (UserError("Stopped by SIGTERM.", "Go on.", exit_code=143), "stopped"),
        (UserError("The loss is not finite.", "Look.", exit_code=1), "failed"),
        (RuntimeError("out of memory"), "failed"),
    ],
)
def test_noting_how_it_ends(tmp_path, error, state):
    run, counter = RunDir(tmp_path), SimpleNamespace(step=7)
    caught = None
    try:
        with noted_state(run, counter, enabled=True) as note:
            assert json.loads(run.status.read_text())["state"] == "running"
            note.write("drawing")
            assert json.loads(run.status.read_text())["state"] == "drawing"
            counter.step = 8
            if error is not None:
                raise error
    except BaseException as raised:
        caught = raised
    found = json.loads(run.status.read_text())
    assert caught is error
    assert (found["state"], found["step"]) == (state, 8)
    assert str(error or "") in found["why"]


def test_other_ranks_note_nothing(tmp_path):
    with noted_state(RunDir(tmp_path), SimpleNamespace(step=1), enabled=False) as note:
        note.write("drawing")
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path):
    run = make_run(tmp_path / "run", records(45), total=450)
    (run.checkpoints / "step-00000450").mkdir(parents=True)
    result = CliRunner().invoke(app, ["status", str(run.root), "--json"])
    found = json.loads(result.stdout)
    assert (found["step"], found["total_steps"], found["checkpoint_step"]) == (450, 450, 450)
    assert found["healthy"] is True
    assert found["loss"] < found["loss_before"]
    table = CliRunner().invoke(app, ["status", str(run.root)]).stdout
    assert "finished" in table
    assert "450 of 450" in table
    assert f"{found['loss']:.4f} (before: {found['loss_before']:.4f})" in table


def test_a_short_run_has_no_loss_before(tmp_path):
    run = make_run(tmp_path / "run", records(2), total=450)
    table = CliRunner().invoke(app, ["status", str(run.root)]).stdout
    assert "loss" in table
    assert "before" not in table
    assert "None" not in table
