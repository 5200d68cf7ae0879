"""Checkpoints of a run: folders `step-00001234` of safetensors and JSON, written beside and renamed into place.

Owns the files and their checks; what the tensors mean is the training stage's business. A checkpoint is a dict of
named groups of tensors (model, optimizer, ema-0.9999) plus a small JSON state.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import RunDir

STATE_FILE = "state.json"
TensorGroups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk.

    Attributes:
        folder: where it lies.
        step: optimizer steps taken when it was written.
        state: the JSON state saved with it.
    """

    folder: Path
    step: int
    state: Mapping[str, Any]

    @property
    def groups(self) -> list[str]:
        """Names of the tensor groups in this checkpoint."""
        return [name.removesuffix(".safetensors") for name in self.state["files"]]

    def path(self, group: str) -> Path:
        """The safetensors file of one group of tensors."""
        return self.folder / f"{group}.safetensors"

    def tensors(self, group: str) -> dict[str, Tensor]:
        """One group of tensors, on the CPU."""
        return load_file(self.path(group))


def write_checkpoint(run: RunDir, step: int, groups: TensorGroups, state: Mapping[str, Any]) -> Path:
    """Write one checkpoint, whole or not at all; tensors must be contiguous and on the CPU.

    Raises:
        OSError: the disk is full or not writable; nothing of this checkpoint is left behind.
    """
    folder = _folder(run, step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {}
        for group, tensors in groups.items():
            path = temporary / f"{group}.safetensors"
            save_file(dict(tensors), path)
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        path = temporary / STATE_FILE
        path.write_text(json.dumps({"step": step, "files": files, **state}, indent=2) + "\n", encoding="utf-8")
        _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def latest_checkpoint(run: RunDir) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None; damaged ones are passed over with a warning."""
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        fault = _fault(folder)
        if fault is None:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            return Checkpoint(folder, state["step"], state)
        log.warning("Checkpoint %s is damaged (%s); the one before it is used.", folder, fault)
    return None


def require_checkpoint(run: RunDir) -> Checkpoint:
    """The newest whole checkpoint of a run, or a UserError where there is none."""
    checkpoint = latest_checkpoint(run.require())
    if checkpoint is None:
        raise UserError(f"The run '{run.root}' has no checkpoint yet.", "Let `xar train` reach its first one.")
    return checkpoint


class CheckpointWriter:
    """Writes checkpoints in the background and removes old ones; training goes on meanwhile.

    Args:
        run: the run folder.
        keep_last: how many of the newest checkpoints to keep.
    """

    def __init__(self, run: RunDir, keep_last: int) -> None:
        self._run, self._keep_last = run, keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, groups: TensorGroups, state: Mapping[str, Any]) -> None:
        """Copy the tensors to the CPU and start writing; waits first for a checkpoint still being written."""
        self.wait()
        copies = {
            group: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        self._pending = self._thread.submit(self._write, step, copies, dict(state))

    def wait(self) -> None:
        """Return when no checkpoint is being written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Finish writing and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, step: int, groups: TensorGroups, state: Mapping[str, Any]) -> None:
        try:
            write_checkpoint(self._run, step, groups, state)
        except OSError as error:
            log.error(
                "Checkpoint of step %d could not be written (%s): the run goes on, the older ones are intact. "
                "Free some disk space.", step, error,
            )  # fmt: skip
            return
        for folder in sorted(self._run.checkpoints.glob("step-*"))[: -self._keep_last]:
            shutil.rmtree(folder)


def _folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in state["files"].items():
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has the wrong size"
            if _crc32(folder / name) != expected["crc32"]:
                return f"{name} fails its checksum"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _flush(path: Path) -> None:
    """Have the operating system put a file's (or folder's) content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
