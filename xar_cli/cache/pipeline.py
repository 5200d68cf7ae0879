"""Rows at the encoder's speed: threads load ahead, the caller's thread encodes, another thread writes.

Owns the flow of work and the count of bad images. Which blocks there are to do, and the files, are the
stage's.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from xar_cli.cache.jobs import Job
from xar_cli.data.cache_file import WRITTEN
from xar_cli.data.images import BadImageError, printable
from xar_cli.data.latents import LatentWriter
from xar_cli.device_memory import memory_for
from xar_cli.errors import UserError
from xar_cli.logs import Progress
from xar_cli.run_dir import format_bytes

BLOCKS_AHEAD = 3  # decoded blocks waiting for the encoder: more only takes memory
WRITES_AHEAD = 2  # blocks waiting for the disk
COMMIT_ROWS = 1024  # a kill loses no more finished work than this,
COMMIT_SECONDS = 2.0  # or this


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) that are encoded together: the same ones on every run, so that a resumed cache has
    equal bytes.
    """

    start: int
    stop: int


class BadList:
    """The images that could not be used: one JSON line each in `<cache>.bad.jsonl`.

    Args:
        path: the file, which several ranks may append to.
        max_bad: how many this process may set aside; None for any number.
    """

    def __init__(self, path: Path, max_bad: int | None) -> None:
        self.path, self.max_bad, self.count = path, max_bad, 0

    def add(self, row: int, error: BadImageError) -> bool:
        """List one image; False when it is one more than allowed."""
        self.count += 1
        line = json.dumps({"row": row, "name": printable(error.name), "reason": printable(error.reason)}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        return self.max_bad is None or self.count <= self.max_bad

    def too_many(self, error: BadImageError) -> UserError:
        """The error that ends the work."""
        return too_many_bad(
            self.path, self.count, self.max_bad, f"; the last is '{printable(error.name)}': {error.reason}"
        )


def too_many_bad(path: Path, count: int, max_bad: int | None, last: str = "") -> UserError:
    """The error of more bad images than `max_bad`, which are listed in `path`; `last` tells of the last one."""
    return UserError(
        f"{count} images are bad, and {max_bad} may be{last}.",
        f"They are listed in '{path}': mend or remove them, or add --skip-bad; the same command goes on from here.",
        exit_code=1,
    )


def encode_blocks(
    job: Job,
    blocks: Sequence[Block],
    writer: LatentWriter,
    bad: BadList,
    display: Progress,
    workers: int,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Make and store all missing rows of some blocks.

    A block is always made whole, its stored and bad rows too, since a row's last bits may depend on the
    batch. An image that is stored and can no longer be read stays stored.

    Args:
        job: what the rows are made from.
        blocks: which rows.
        writer: of the cache.
        bad: where images that cannot be used are listed.
        display: where rows are counted for people.
        workers: threads that load.
        stop: called before each block; may raise to end the work. What was made is stored then.

    Raises:
        UserError: more bad images than allowed, a machine that fails to read images, or moments that are not
            finite (exit code 1); what was made is stored.
        OSError: the disk failed; what was committed is stored.
    """
    store = _Store(writer, display, bad)
    try:
        for block, loaded in _load_ahead(job, blocks, workers):
            stop()
            items, failures = _collect(job, loaded)
            done = writer.states[block.start : block.stop] == WRITTEN
            for i, error in failures.items():
                if done[i]:
                    continue
                if not bad.add(block.start + i, error):
                    raise bad.too_many(error)
                store.put_bad(block.start + i)
            keep = np.flatnonzero(~done & ~np.isin(np.arange(len(done)), list(failures)))
            if len(keep):
                with memory_for(f"Encoding {len(items)} images at a time", "Lower --batch-size: it goes on from here."):
                    moments = job.encode(items)
                store.put(block.start + keep, keep, moments)
            store.raise_if_failed()
    finally:
        store.close()
    store.raise_if_failed()


class _Store:
    """A thread that takes moments off the device and writes them, so that the encoder need not wait for the
    disk. No handler of a signal may raise while work is handed to it (stopping.py).
    """

    def __init__(self, writer: LatentWriter, display: Progress, bad: BadList) -> None:
        self._writer, self._display, self._bad = writer, display, bad
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="latent-writer")
        self._waiting: deque[Future[None]] = deque()
        self._error: BaseException | None = None
        self._committed, self._rows_since = time.monotonic(), 0

    def put(self, rows: np.ndarray, keep: np.ndarray, moments: list[Tensor]) -> None:
        """Write the moments at `keep` of a block as these rows, soon."""
        self._hand_over(lambda: self._write(rows, keep, moments), len(rows))

    def put_bad(self, row: int) -> None:
        """Set a row aside, soon."""
        self._hand_over(lambda: self._writer.mark_bad(row), 1)

    def raise_if_failed(self) -> None:
        """Raise what the thread has met."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write what was put, commit it, end the thread."""
        try:
            self._pool.submit(self._do, self._writer.commit)
        finally:
            self._pool.shutdown()

    def _hand_over(self, work: Callable[[], object], rows: int) -> None:
        """Have the thread do some work on so many rows; waits where it has more than a little to do."""
        self._waiting.append(self._pool.submit(self._do, work, rows))
        if len(self._waiting) > WRITES_AHEAD:
            self._waiting.popleft().result()

    def _do(self, work: Callable[[], object], rows: int = 0) -> None:
        if self._error is not None:
            return
        try:
            work()
            self._rows_since += rows
            if self._rows_since >= COMMIT_ROWS or time.monotonic() - self._committed >= COMMIT_SECONDS:
                self._writer.commit()
                self._committed, self._rows_since = time.monotonic(), 0
        except BaseException as error:  # handed to the thread that waits for the work
            self._error = error

    def _write(self, rows: np.ndarray, keep: np.ndarray, moments: list[Tensor]) -> None:
        arrays = [tensor.float().cpu().numpy()[keep] for tensor in moments]
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(
                f"The tokenizer gives moments that are not finite for the images {rows[0]} to {rows[-1]}.",
                "Check its weights; with --precision bf16, try fp32.",
                exit_code=1,
            )
        self._writer.write(rows, *arrays)
        notes = {"written": format_bytes(self._writer.bytes_written), "failed": self._bad.count}
        self._display.update(len(rows), **notes)


def _load_ahead(job: Job, blocks: Iterable[Block], workers: int) -> Iterator[tuple[Block, list[Future[np.ndarray]]]]:
    """Every block with its items being loaded, a few blocks ahead of the one in use."""
    waiting: deque[tuple[Block, list[Future[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for block in blocks:
            waiting.append((block, [pool.submit(job.load, row) for row in range(block.start, block.stop)]))
            if len(waiting) > BLOCKS_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(job: Job, loaded: list[Future[np.ndarray]]) -> tuple[np.ndarray, dict[int, BadImageError]]:
    """The items of a block, (B, *item_shape), zeros where one failed, and the failures."""
    items = np.zeros((len(loaded), *job.item_shape), job.item_dtype)
    failures = {}
    for i, future in enumerate(loaded):
        try:
            items[i] = future.result()
        except BadImageError as error:
            failures[i] = error
    return items, failures
