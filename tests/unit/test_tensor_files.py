"""Files of tensors: what may be in a pickle, and loading that lets go of what it has read."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from xar_cli import tensor_files
from xar_cli.errors import UserError
from xar_cli.tensor_files import (
    check_state,
    copy_and_release,
    file_mappings,
    is_state,
    read_safetensors,
    read_tensor_file,
    write_safetensors,
)


class Runs:
    """A pickle of this object runs a command when it is opened carelessly."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path, zipped):
    trace = tmp_path / "trace"
    torch.save(
        {"model": {"w": torch.zeros(1)}, "args": Runs(f"touch {trace}")},
        tmp_path / "bad.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match="could run code"):
        read_tensor_file(tmp_path / "bad.pth")
    assert not trace.exists()
    with (tmp_path / "bad.pth").open("rb") as file:  # the file is as bad as it claims to be
        torch.load(file, weights_only=False)
    assert trace.exists()


def test_a_plain_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(Runs(f"touch {trace}")))
    with pytest.raises(UserError):
        read_tensor_file(tmp_path / "bad.ckpt")
    assert not trace.exists()


def test_a_namespace_is_allowed_and_keeps_what_it_holds(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pth")
    assert read_tensor_file(tmp_path / "args.pth")[0]["args"].lr == 0.1


def test_a_namespace_is_no_way_in(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"args": argparse.Namespace(lr=Runs(f"touch {trace}"))}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="could run code"):
        read_tensor_file(tmp_path / "bad.pth")
    assert not trace.exists()


def test_other_objects_are_not_allowed(tmp_path):
    torch.save({"array": np.zeros(3)}, tmp_path / "array.pth")
    with pytest.raises(UserError, match=r"could run code \(numpy\.") as caught:
        read_tensor_file(tmp_path / "array.pth")
    assert not set(caught.value.message) & {"\x1b", "\n"}
    assert "weights_only" not in caught.value.message


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_short_anywhere_is_a_sentence(tmp_path, zipped):
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    content = {"model": {"w": torch.arange(6.0), "h": torch.ones(2).half()}, "epoch": 3}
    torch.save(content, whole, _use_new_zipfile_serialization=zipped)
    for length in range(0, whole.stat().st_size, 5 if zipped else 1):
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(UserError, match=r"cannot be read|no file of weights"):
            read_tensor_file(cut)


def test_an_old_pickle_whose_list_of_storages_is_damaged_is_a_sentence(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"w": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    before, digit, after = re.fullmatch(rb"(.*\d{6})(\d)(.*)", path.read_bytes(), re.DOTALL).groups()
    path.write_bytes(before + (b"1" if digit == b"0" else b"0") + after)
    with pytest.raises(UserError, match="cannot be read as a PyTorch file"):
        read_tensor_file(path)


@pytest.mark.parametrize("kind", ["script", "zeros"])
def test_where_torch_advises_to_open_a_file_all_the_same_its_words_are_not_told(tmp_path, kind, recwarn):
    path = tmp_path / "weights.pth"
    path.write_bytes(bytes(1 << 16))  # as a download leaves that reserves its space
    if kind == "script":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/version", "3\n")
            archive.writestr("a/constants.pkl", pickle.dumps((), 2))
            archive.writestr("a/data.pkl", pickle.dumps((), 2))
    with pytest.raises(UserError, match=r"is a TorchScript archive .* or no PyTorch file") as error:
        read_tensor_file(path)
    assert "weights_only" not in str(error.value)
    assert not recwarn.list


@pytest.mark.parametrize("reader", ["open", "safe_open"])
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch, reader):
    """For a root user too: it becomes unreadable before its first bytes, or after them."""
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(*(Path, "open") if reader == "open" else (tensor_files, "safe_open"), refuse)
    with pytest.raises(UserError, match=r"(Cannot read|cannot be read).*Permission denied"):
        read_tensor_file(tmp_path / "weights.safetensors")


def test_a_folder_is_not_called_missing(tmp_path):
    with pytest.raises(UserError, match=r"is a folder\. Give the file in it\."):
        read_tensor_file(tmp_path)


def test_the_kind_of_file_follows_from_its_content(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "weights.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.ckpt")
    for name in ("weights.pth", "weights.ckpt"):
        content, _ = read_tensor_file(tmp_path / name)
        assert torch.equal(content["w"], torch.ones(2))


def test_a_pickle_that_calls_itself_safetensors_is_read_or_refused_but_never_a_traceback(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with suppress(UserError):  # newer torch goes by the name, and finds no safetensors
        content, _ = read_tensor_file(tmp_path / "weights.safetensors")
        assert torch.equal(content["w"], torch.ones(2))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's account of memory")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_copying_lets_go_of_what_it_has_read(tmp_path, suffix):
    state = {f"w{i}": torch.full((1 << 20,), float(i)) for i in range(24)}  # 4 MB each, 96 MB in all
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    content, _ = read_tensor_file(path)
    mappings = file_mappings()
    target = torch.empty(1 << 20)
    before = resident_bytes()
    for tensor in content.values():
        copy_and_release(target, tensor, mappings)
    assert resident_bytes() - before < 16e6
    assert all(torch.equal(content[name], tensor) for name, tensor in state.items())  # read again from the file


def test_memory_that_is_no_file_is_never_let_go():
    source = torch.arange(1 << 20, dtype=torch.float32)
    target = torch.empty(1 << 20)
    copy_and_release(target, source, file_mappings())
    assert torch.equal(source, target)
    assert source[-1] == (1 << 20) - 1


def test_every_kind_of_fault_is_named_at_once():
    with pytest.raises(UserError) as error:
        check_state({"a": torch.zeros(2), "x": torch.zeros(1)}, {"a": (3,), "b": (1,)}, "The file", "Fix it.")
    assert error.value.message == "The file does not fit: 1 missing: b; 1 unknown: x; 1 misshapen: a is (2), not (3)."


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, dtype=torch.int8), "a is int8"),
        (torch.zeros(2, dtype=torch.bool), "a is bool"),
        (torch.zeros(2, dtype=torch.complex64), "a is complex64"),
        (torch.zeros(2).to_sparse(), "a is sparse_coo"),
    ],
)
def test_tensors_that_nothing_can_be_computed_with_are_named(tensor, said):
    with pytest.raises(UserError, match=f"The file does not fit: 1 unusable: {said}\\."):
        check_state({"a": tensor, "b": torch.zeros(2).half()}, {"a": (2,), "b": (2,)}, "The file", "Fix it.")


def test_a_state_has_names_and_values():
    assert is_state({"a": torch.zeros(2)})
    for nothing in ({}, {"a": torch.zeros(2, device="meta")}, {"a": 1}, {1: torch.zeros(2)}, torch.zeros(2)):
        assert not is_state(nothing)


def resident_bytes() -> int:
    """Memory of this process that is in RAM, files included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_file_may_be_read_by_whoever_may_read_its_folder(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    write_safetensors({"w": torch.ones(2)}, folder / "w.safetensors", {"key": "value"})
    assert (folder / "w.safetensors").stat().st_mode & 0o777 == 0o644
    assert read_safetensors(folder / "w.safetensors")[1] == {"key": "value"}


def test_a_disk_that_knows_no_modes_takes_the_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    write_safetensors({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_safetensors(tmp_path / "w.safetensors")[0]["w"].sum() == 2
