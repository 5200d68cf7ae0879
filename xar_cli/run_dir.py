"""Where things lie inside a run folder, and how a file is put there whole.

Owns names, and what all files are read and written with: whole or not at all, at a place, flushed, where there is room.
Knows nothing of what they mean.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xar_cli.errors import UserError


@dataclass(frozen=True)
class RunDir:
    """The paths inside the folder of one training run."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config of the run, as YAML."""
        return self.root / "config.yaml"

    @property
    def identity(self) -> Path:
        """Which data and which program version the run was made with, as JSON."""
        return self.root / "run.json"

    @property
    def status(self) -> Path:
        """What the run is doing, or why it ended, as JSON."""
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line each logging step."""
        return self.root / "metrics.jsonl"

    @property
    def skipped_steps(self) -> Path:
        """One JSON object a line, one line each step that was not finite."""
        return self.root / "skipped_steps.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folders `step-00001234`, one a checkpoint."""
        return self.root / "checkpoints"

    def checkpoint_folders(self) -> list[Path]:
        """All folders of checkpoints, whole or not, oldest first; others beside them are left alone.

        Raises:
            OSError: it cannot be read what is there.
        """
        try:
            names = os.listdir(self.checkpoints)  # a glob would take a folder that cannot be read for an empty one
        except FileNotFoundError:
            return []
        return sorted((self.checkpoints / name for name in names if re.fullmatch(r"step-\d+", name)), key=step_of)

    def checkpoint_steps(self) -> list[int]:
        """The steps of `checkpoint_folders`."""
        return [step_of(folder) for folder in self.checkpoint_folders()]

    @property
    def samples(self) -> Path:
        """Folders of generated images."""
        return self.root / "samples"

    @property
    def previews(self) -> Path:
        """Grids of fixed seeds made while training."""
        return self.root / "previews"

    @property
    def features(self) -> Path:
        """Features of the reference, for the evaluations made while training."""
        return self.root / "features"

    @property
    def lock(self) -> Path:
        """Held by the job that trains here."""
        return self.root / ".lock"

    def read_identity(self) -> dict[str, Any]:
        """What run.json holds; nothing where there is none.

        Raises:
            UserError: it is damaged.
        """
        try:
            return dict(json.loads(self.identity.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError):
            raise UserError(
                f"'{self.identity}' is damaged.", "Take it from a backup, or begin anew with another --out."
            ) from None

    def left_by_a_kill(self) -> list[Path]:
        """Files that were being written when a job died, as `write_atomic` names them."""
        places = (self.config, self.identity, self.status, self.metrics, self.skipped_steps)
        return [path for place in places for path in temporary_files(place)]

    def exists(self) -> bool:
        """Whether a run has been started here; raises UserError as `is_there`."""
        return is_there(self.root) and is_file(self.config)

    def require(self) -> RunDir:
        """This run folder, or a UserError where there is none."""
        if not self.exists():
            raise UserError(
                f"'{self.root}' is not a run folder: it has no {self.config.name}.",
                "Give the folder that `xar train --out` wrote.",
            )
        return self


def is_there(path: Path) -> bool:
    """Whether there is a file or a folder at a path.

    Raises:
        UserError: it cannot be told: a folder on the way may not be entered, or a name is too long.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"'{path}' cannot be opened: {error.strerror}.", "Check the path.") from None
    return True


def is_file(path: Path) -> bool:
    """Whether there is a file at a path; raises UserError as `is_there`."""
    return is_there(path) and path.is_file()


def require_possible(path: Path) -> None:
    """Raise a UserError where nothing can be read or written at a path, whether something is there or not."""
    is_there(path)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file beside its place, flush it to disk, then rename it into place: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_files(path: Path) -> list[Path]:
    """What a process that was killed while it wrote `path` has left beside it: files, or folders of an export."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")  # of `write_atomic`
    return [found for found in path.parent.glob(".*.tmp") if name.fullmatch(found.name)]


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the bytes at a place in an open file, of which the system may take a part at a time."""
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Read so many bytes at a place in an open file, of which the system may give a part at a time.

    Raises:
        OSError: the file ends before.
    """
    parts: list[bytes] = []
    while count:
        parts.append(os.pread(descriptor, count, offset))
        if not parts[-1]:
            raise OSError(errno.EIO, "the file has become shorter while it was being read")
        count, offset = count - len(parts[-1]), offset + len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


def flush(path: Path) -> None:
    """Have the operating system put a file's (or folder's) content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def require_writable(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise a UserError unless `folder` can be written to and its disk has `needed_bytes` free.

    The folder need not exist: its nearest existing parent is asked. Nothing is created. A path through a folder that
    may not be entered is a UserError too.
    """
    existing = folder.absolute()
    while not is_there(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write {purpose} under '{existing}'.", "Choose another folder or fix its permissions.")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"Not enough disk space for {purpose} under '{existing}': {format_bytes(needed_bytes)} needed, "
            f"{format_bytes(free)} free.",
            "Free some space or choose a folder on another disk.",
        )


def format_bytes(count: float) -> str:
    """A byte count for people: 1536 -> '1.5 KB' (powers of 1000 as disks are sold)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
