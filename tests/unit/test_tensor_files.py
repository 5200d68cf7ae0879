"""Files of tensors: what may be in a pickle, and loading that lets go of what it has read."""

from __future__ import annotations

import argparse
import os
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from xar_cli.errors import UserError
from xar_cli.tensor_files import check_state, copy_and_release, file_mappings, read_tensor_file


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


def resident_bytes() -> int:
    """Memory of this process that is in RAM, files included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
