import errno
import json
import logging
import os

import pytest
import torch

from tests.runs import damage
from xar_cli import checkpoint
from xar_cli.checkpoint import (
    CheckpointWriter,
    latest_checkpoint,
    require_checkpoint,
    set_aside_newer,
    write_checkpoint,
)
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
            checkpoint, "write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        writer.save(2, groups(2), {})
        writer.wait()
    assert steps(run) == [1]
    assert "No space left" in caplog.text
    writer.save(3, groups(3), {})
    writer.close()
    assert steps(run) == [3]
    assert json.loads((latest_checkpoint(run).folder / "state.json").read_text())["step"] == 3


def test_damaged_ones_only_are_a_sentence(run):
    for step in (1, 2):
        write_checkpoint(run, step, groups(step), {})
    damage(run.root, 1)
    (run.checkpoints / "step-00000002" / "state.json").unlink()
    with pytest.raises(UserError, match=r"No checkpoint of the run .* is whole") as caught:
        latest_checkpoint(run)
    assert "step-00000001: model.safetensors has the wrong size" in caught.value.message
    assert "step-00000002: state.json is missing" in caught.value.message
    assert steps(run) == [1, 2]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_one_that_cannot_be_read_is_not_called_damaged(run, monkeypatch, number):
    for step in (1, 2):
        write_checkpoint(run, step, groups(step), {})
    crc32 = checkpoint._crc32

    def refuse(path):
        if "step-00000002" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return crc32(path)

    monkeypatch.setattr(checkpoint, "_crc32", refuse)
    with pytest.raises(UserError, match=f"cannot be read: {os.strerror(number)}") as caught:
        latest_checkpoint(run)
    assert "step-00000002" in caught.value.next_step
    assert steps(run) == [1, 2]


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_an_empty_one(run, monkeypatch):
    write_checkpoint(run, 1, groups(1), {})

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.os, "listdir", refuse)
    monkeypatch.setattr(checkpoint.os, "scandir", refuse)  # as a glob reads it
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        latest_checkpoint(run)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_later_ones_take_no_place_and_are_kept_aside(run, caplog, keep_last):
    for step in (3, 4, 5):
        write_checkpoint(run, step, groups(step), {})
    damage(run.root, 4, 5)
    found = latest_checkpoint(run)
    assert found.step == 3
    set_aside_newer(run, found.step)
    assert "damaged-step-00000004" in caplog.text
    writer = CheckpointWriter(run, keep_last)
    for step in (4, 5, 6):
        writer.save(step, groups(step), {})
        writer.wait()
        assert steps(run)[-1] == step  # the one just written is there
        assert latest_checkpoint(run).step == step
    writer.close()
    assert steps(run) == [5, 6][-keep_last:]
    damage(run.root, *steps(run))
    write_checkpoint(run, 4, groups(4), {})
    set_aside_newer(run, 4)
    aside = sorted(path.name for path in run.checkpoints.glob("damaged-*"))
    assert aside[:2] == ["damaged-step-00000004", "damaged-step-00000005"]
    assert aside[-1] == "damaged-step-00000006"
    assert ("damaged-step-00000005-2" in aside) == (keep_last == 2)
    assert (run.checkpoints / "damaged-step-00000005" / "model.safetensors").read_bytes() == b"torn"


def test_retention_touches_nothing_later(run):
    """Whatever lies there of later steps: neither it nor the checkpoint just written is removed."""
    for step in (7, 8):
        write_checkpoint(run, step, groups(step), {})
    writer = CheckpointWriter(run, keep_last=1)
    for step in (1, 2):
        writer.save(step, groups(step), {})
    writer.close()
    assert steps(run) == [2, 7, 8]


def test_other_names_beside_checkpoints_are_left_alone(run):
    write_checkpoint(run, 1, groups(1), {})
    (run.checkpoints / "step-00000001-copy").mkdir()
    writer = CheckpointWriter(run, keep_last=1)
    writer.save(2, groups(2), {})
    writer.close()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000001-copy", "step-00000002"]
    assert latest_checkpoint(run).step == 2
