import json
import logging

import pytest
import torch

from xar_cli import checkpoint
from xar_cli.checkpoint import CheckpointWriter, latest_checkpoint, require_checkpoint, write_checkpoint
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def caplog(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="xar")
    return caplog


def groups(value: float):
    return {"model": {"w": torch.full((3, 2), value)}, "ema-0.9": {"w": torch.full((3, 2), -value)}}


def steps(run):
    return [int(folder.name.partition("-")[2]) for folder in sorted(run.checkpoints.glob("step-*"))]


def test_round_trip(run):
    write_checkpoint(run, 7, groups(1.5), {"world_size": 2})
    found = require_checkpoint_of(run)
    assert found.step == 7
    assert found.state["world_size"] == 2
    assert sorted(found.groups) == ["ema-0.9", "model"]
    assert found.tensors("model")["w"].equal(torch.full((3, 2), 1.5))
    assert found.tensors("ema-0.9")["w"].equal(torch.full((3, 2), -1.5))


def require_checkpoint_of(run):
    run.root.mkdir(exist_ok=True)
    run.config.write_text("")
    return require_checkpoint(run)


def test_an_old_one_that_cannot_be_removed_is_told_and_stays(run, caplog, monkeypatch):
    def busy(*_, **__):
        raise OSError(16, "Device or resource busy")

    write_checkpoint(run, 1, groups(1), {})
    writer = CheckpointWriter(run, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else busy())
        writer.save(2, groups(2), {})
        writer.wait()
    assert "step-00000001 could not be removed" in caplog.text
    assert writer.fault is None
    assert steps(run) == [1, 2]
    writer.save(3, groups(3), {})
    writer.close()
    assert steps(run) == [3]


def test_no_checkpoint(run):
    assert latest_checkpoint(run) is None
    run.root.mkdir()
    run.config.write_text("")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        require_checkpoint(run)


@pytest.mark.parametrize("damage", ["flip", "shorten", "no state", "bad json", "no file"])
def test_a_damaged_newest_one_is_passed_over(run, caplog, damage):
    write_checkpoint(run, 1, groups(1), {})
    newest = write_checkpoint(run, 2, groups(2), {})
    file, state = newest / "model.safetensors", newest / "state.json"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "shorten":
        file.write_bytes(data[:-1])
    elif damage == "no state":
        state.unlink()
    elif damage == "bad json":
        state.write_text(state.read_text()[:-9])
    else:
        file.unlink()
    assert latest_checkpoint(run).step == 1
    assert "step-00000002 is damaged" in caplog.text


def test_an_unfinished_one_is_no_checkpoint(run, monkeypatch):
    write_checkpoint(run, 1, groups(1), {})
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 2, groups(2), {})
    assert latest_checkpoint(run).step == 1
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]


def test_the_writer_copies_before_it_returns(run):
    writer, tensors = CheckpointWriter(run, keep_last=2), groups(1)
    writer.save(1, tensors, {})
    tensors["model"]["w"].fill_(99)
    writer.close()
    assert latest_checkpoint(run).tensors("model")["w"].equal(torch.ones(3, 2))


def test_retention(run):
    writer = CheckpointWriter(run, keep_last=2)
    for step in range(1, 6):
        writer.save(step, groups(step), {})
    writer.close()
    assert steps(run) == [4, 5]


def test_a_full_disk_leaves_the_old_ones_and_goes_on(run, monkeypatch, caplog):
    writer = CheckpointWriter(run, keep_last=1)
    writer.save(1, groups(1), {})
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "_save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        writer.save(2, groups(2), {})
        writer.wait()
    assert steps(run) == [1]
    assert "No space left" in caplog.text
    writer.save(3, groups(3), {})
    writer.close()
    assert steps(run) == [3]
    assert json.loads((latest_checkpoint(run).folder / "state.json").read_text())["step"] == 3
