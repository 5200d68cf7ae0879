"""What a person sees while work goes on: log lines and progress on stderr, metrics.jsonl in the run folder.

Results are not printed here: a command prints its one result on stdout.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("xar")

SECONDS_BETWEEN_LINES = 30.0  # without a terminal, progress is one line this often


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the time, and steps around a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logs(rank: int = 0) -> None:
    """Send log lines to stderr: everything on rank 0, warnings and errors (with their rank) on the others."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class Progress:
    """A bar on a terminal; without one, a line every 30 seconds. Always on stderr.

    Args:
        total: how many units make the whole work.
        label: what is being done, in a word or two.
        unit: the name of one unit, in the singular.
        initial: units already done when the work starts (on resume).
        enabled: False on ranks that must stay silent.
    """

    def __init__(self, total: int, label: str, unit: str = "image", initial: int = 0, enabled: bool = True) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = self.initial = initial
        self._notes: dict[str, str] = {}
        self._start = self._last_line = time.monotonic()
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total, desc=label, unit=unit, initial=initial, file=sys.stderr, dynamic_ncols=True,
            disable=not enabled or self._lines,
        )  # fmt: skip

    def update(self, count: int = 1, **notes: object) -> None:
        """Count `count` more units; `notes` are shown beside the bar (loss, failures, bytes)."""
        self.done += count
        self._notes.update({key: str(value) for key, value in notes.items()})
        if notes and not self._bar.disable:
            self._bar.set_postfix(self._notes, refresh=False)
        self._bar.update(count)
        if self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info(self.line())

    def line(self) -> str:
        """The state of the work in one line: done, rate, time left, notes."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self.initial) / elapsed
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = tqdm.format_interval(left) if left < 1e8 else "?"
        notes = "".join(f" {key}={value}" for key, value in self._notes.items())
        return f"{self.label}: {self.done}/{self.total} {self.unit}s, {rate:.1f}/s, {eta} left{notes}"

    def close(self) -> None:
        """Finish the display; without a terminal, one closing line."""
        self._bar.close()
        if self._lines:
            self._lines = False
            log.info(self.line())


@contextmanager
def progress(total: int, label: str, unit: str = "image", initial: int = 0, enabled: bool = True) -> Iterator[Progress]:
    """A `Progress` that closes itself when the work ends or fails."""
    display = Progress(total, label, unit, initial, enabled)
    try:
        yield display
    finally:
        display.close()


class MetricsWriter:
    """Appends one JSON object per line to metrics.jsonl; a torn last line, left by a kill, is cut off first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                os.truncate(path, whole)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append one record; it is on disk (in the operating system's hands) when this returns."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """All whole records of a metrics.jsonl file, oldest first; a torn last line is left out.

    So is any other line that is no record, as a disk may leave it after a power cut; that is said.
    """
    if not path.exists():
        return []
    found: list[Mapping[str, Any]] = []
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            record = json.loads(line) if line else None
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            unreadable += bool(line)
    if unreadable:
        log.warning("%d lines of '%s' cannot be read and are left out.", unreadable, path)
    return found
