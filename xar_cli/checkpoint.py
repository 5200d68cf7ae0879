"""Checkpoints of a run: folders `step-00001234` of safetensors and JSON, written beside and renamed into place.

Owns the files, their checks and how long they are kept; what the tensors mean is the training stage's business. A
checkpoint is a dict of named groups of tensors (model, optimizer, ema-0.9999) plus a small JSON state.
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

import torch
from safetensors.torch import load_file
from torch import Tensor

from xar_cli.distributed import whole_tensor
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import RunDir, flush, step_of
from xar_cli.tensor_files import write_safetensors

STATE_FILE = "state.json"
MEND = "Mend its permissions or its disk, and run the command again."
SET_ASIDE = "damaged-"  # before the name of a folder that is no longer counted
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
            write_safetensors(dict(tensors), path)
            flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        path = temporary / STATE_FILE
        path.write_text(json.dumps({"step": step, "files": files, **state}, indent=2) + "\n", encoding="utf-8")
        flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def latest_checkpoint(run: RunDir, files: str = "") -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where there is none at all; nothing on disk is changed.

    Damaged ones are passed over with a warning. One that cannot be read is not called damaged: it may be whole.

    Args:
        run: the run folder.
        files: what the names of the files begin with that are read and have to be whole; others may be damaged.

    Raises:
        UserError: there are checkpoints and none is whole, or the newest ones cannot be read.
    """
    faults: dict[str, str] = {}
    for folder in reversed(folders_to_read(run)):
        fault = _fault(folder, files)
        if fault is None:
            for name, why in faults.items():
                log.warning("Checkpoint %s is damaged (%s); %s is used.", run.checkpoints / name, why, folder.name)
            return open_checkpoint(folder)
        faults[folder.name] = fault
    if faults:
        listed = "; ".join(f"{name}: {why}" for name, why in faults.items())
        raise UserError(
            f"No checkpoint of the run '{run.root}' is whole ({listed}).",
            f"Put a sound copy into '{run.checkpoints}', or begin another run folder; this one was left as it is.",
        )
    return None


def set_aside_newer(run: RunDir, step: int) -> None:
    """Rename the checkpoints after `step`, which were found damaged, to `damaged-step-...`; none is deleted.

    Raises:
        UserError: one cannot be renamed.
    """
    for folder in folders_to_read(run):
        if step_of(folder) > step:
            try:
                _set_aside(folder)
            except OSError as error:
                raise UserError(
                    f"The damaged checkpoint '{folder}' cannot be renamed: {error.strerror}.",
                    "Mend the permissions of its folder, or move it away yourself.",
                ) from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that is known to be whole."""
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return Checkpoint(folder, state["step"], state)


def require_checkpoint(run: RunDir, files: str = "") -> Checkpoint:
    """The newest whole checkpoint of a run, as `latest_checkpoint`, or a UserError where there is none."""
    checkpoint = latest_checkpoint(run.require(), files)
    if checkpoint is None:
        raise UserError(f"The run '{run.root}' has no checkpoint yet.", "Let `xar train` reach its first one.")
    return checkpoint


class CheckpointWriter:
    """Writes checkpoints in the background and removes old ones; training goes on meanwhile.

    Args:
        run: the run folder.
        keep_last: how many of the newest checkpoints to keep.
        keep_every: also keep each whose step is a multiple of this; 0 for none.
        writes: False on ranks that only give their shards.

    Attributes:
        fault: why the newest checkpoint could not be written, or None.
    """

    def __init__(self, run: RunDir, keep_last: int, keep_every: int = 0, writes: bool = True) -> None:
        self._run, self._keep_last, self._keep_every, self._writes = run, keep_last, keep_every, writes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pinned: dict[tuple[str, str], Tensor] = {}
        self.fault: str | None = None
        if writes:
            for left_by_a_kill in run.checkpoints.glob(".step-*.tmp"):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)

    def save(self, step: int, groups: TensorGroups, state: Mapping[str, Any]) -> None:
        """Copy the tensors to the host and start writing; waits first for a checkpoint still being written.

        Every rank calls this: shards are gathered tensor by tensor. From a CUDA device the copies go to pinned memory
        and are only queued here, before any later step: neither host nor device waits for them.
        """
        self.wait()
        copies: dict[str, dict[str, Tensor]] = {}
        for group, tensors in groups.items():
            copies[group] = {}
            for name, tensor in tensors.items():
                whole = whole_tensor(tensor.detach())
                if self._writes:
                    copies[group][name] = self._host_copy(group, name, whole)
        if not self._writes:
            return
        copied = torch.cuda.Event() if self._pinned else None
        if copied is not None:
            copied.record()
        self._pending = self._thread.submit(self._write, step, copies, dict(state), copied)

    def wait(self) -> None:
        """Return when no checkpoint is being written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Finish writing and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _host_copy(self, group: str, name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.clone().contiguous()
        if (group, name) not in self._pinned:
            self._pinned[group, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._pinned[group, name].copy_(tensor, non_blocking=True)

    def _write(
        self, step: int, groups: TensorGroups, state: Mapping[str, Any], copied: torch.cuda.Event | None
    ) -> None:
        if copied is not None:
            copied.synchronize()
        try:
            write_checkpoint(self._run, step, groups, state)
        except OSError as error:
            self.fault = str(error)
            log.error(
                "Checkpoint of step %d could not be written (%s): the run goes on, the older ones are intact. "
                "Free some disk space.", step, error,
            )  # fmt: skip
            return
        self.fault = None
        try:
            self._remove_old(step)
        except OSError as error:
            log.warning("Old checkpoints could not be looked for: %s.", error)

    def _remove_old(self, newest: int) -> None:
        """Remove what is no longer kept; the checkpoint of step `newest`, and what lies after it, is never touched."""
        older = [folder for folder in self._run.checkpoint_folders() if step_of(folder) < newest]
        for folder in older[: max(0, len(older) - (self._keep_last - 1))]:
            if not (self._keep_every and step_of(folder) % self._keep_every == 0):
                try:
                    shutil.rmtree(folder)
                except OSError as error:  # a network drive may still hold a file of it
                    log.warning("The old checkpoint %s could not be removed: %s.", folder, error)


def _folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def folders_to_read(run: RunDir) -> list[Path]:
    """The checkpoint folders of a run; that they cannot be read is a UserError."""
    try:
        return run.checkpoint_folders()
    except OSError as error:
        raise UserError(f"'{run.checkpoints}' cannot be read: {error.strerror}.", MEND) from None


def _set_aside(folder: Path) -> None:
    target, copies = folder.with_name(SET_ASIDE + folder.name), 1
    while target.exists():
        copies += 1
        target = folder.with_name(f"{SET_ASIDE}{folder.name}-{copies}")
    folder.rename(target)
    log.warning("The damaged %s is kept as %s.", folder.name, target.name)


def require_whole(folder: Path, files: str = "") -> None:
    """Raise a UserError unless a checkpoint's files, those whose names begin with `files`, are as they were written."""
    fault = _fault(folder, files)
    if fault is not None:
        raise UserError(f"The checkpoint '{folder}' is damaged: {fault}.", "Give another checkpoint, or a sound copy.")


def _fault(folder: Path, files: str = "") -> str | None:
    """What is wrong with a checkpoint's files, those whose names begin with `files`, or None; a UserError where they
    cannot be read.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in state["files"].items():
            if not name.startswith(files):
                continue
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has the wrong size"
            if _crc32(folder / name) != expected["crc32"]:
                return f"{name} fails its checksum"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        raise UserError(
            f"'{error.filename or folder}' cannot be read: {error.strerror}.",
            f"{MEND} If it is lost, rename '{folder}': then the checkpoint before it is used.",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_FILE} is no checkpoint's: {type(error).__name__}: {error}"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
