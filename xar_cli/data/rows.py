"""Rows of moments as bytes in files: the one place that reads them.

Reads go to the dataset's offset, past HDF5 and its lock; the object may be used from many threads, carried
over fork, and pickled for spawn. Which rows are samples, and their labels, are latents.py's.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from typing import Any

import h5py
import numpy as np

from xar_cli.data.cache_file import CacheFile, open_hdf5
from xar_cli.data.memory import MemoryCopy


class RowReader:
    """Reads rows of a cache by number.

    Args:
        file: the cache. One that is chunked or compressed is read through h5py, more slowly.
        in_memory: read from a copy in memory that the processes of this machine share (memory.py).
    """

    _descriptors: list[int]

    def __init__(self, file: CacheFile, in_memory: bool = False) -> None:
        self._file, self._in_memory = file, in_memory
        self._open()

    def read(self, rows: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Moments (B, 2C, H, W) in the stored dtype.

        Args:
            rows: int64 (B,), 0 to N - 1.
            which: int64 (B,), 0 for the image and 1 for its mirror image.

        Raises:
            OSError: the file is gone or has become shorter.
        """
        moments = np.empty((len(rows), *self._row_shape), self._dtype)
        read = self._read_bytes if self._shards else self._read_hdf5
        read(rows.tolist(), which.tolist(), moments)
        return moments

    def close(self) -> None:
        """Let go of the files; the reader cannot be used afterwards."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)
        if self._copy:
            self._copy.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_in_memory": self._in_memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._copy = MemoryCopy(self._file) if self._in_memory else None
        self._shards = [self._copy.shard] if self._copy else self._file.shards
        layout = self._file.layout
        self._row_shape, self._row_bytes, self._dtype = layout.row_shape, layout.row_bytes, np.dtype(layout.dtype)
        self._stops = [shard.stop for shard in self._shards]
        # Where row 0 would lie if the file held all rows from 0 on: one multiplication finds any row of a shard.
        self._origins = [
            [shard.offsets[name] - shard.start * self._row_bytes for name in layout.moments_names]
            for shard in self._shards
        ]
        self._lock = threading.Lock()
        self._hdf5: tuple[int, h5py.File] | None = None
        self._descriptors = [os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC) for shard in self._shards]

    def _read_bytes(self, rows: list[int], which: list[int], out: np.ndarray) -> None:
        size, preadv = self._row_bytes, os.preadv  # a call or two a sample is all there is: no arrays, no copies
        view, filled = memoryview(out).cast("B"), 0  # type: ignore[arg-type]
        for row, image in zip(rows, which, strict=True):
            shard = bisect_right(self._stops, row)
            place = self._origins[shard][image] + row * size
            part = view[filled : filled + size]
            if preadv(self._descriptors[shard], (part,), place) != size:
                self._read_again(self._descriptors[shard], part, place)
            filled += size

    def _read_again(self, descriptor: int, part: memoryview, place: int) -> None:
        """Read what a single call did not give in one piece (a signal, a network disk)."""
        while part:
            done = os.preadv(descriptor, (part,), place)
            if not done:
                raise OSError(f"{self._file.path}: the file has become shorter while it was being read")
            part, place = part[done:], place + done

    def _read_hdf5(self, rows: list[int], which: list[int], out: np.ndarray) -> None:
        """Read through h5py, with a handle of this process (a handle must not cross fork)."""
        with self._lock:
            if self._hdf5 is None or self._hdf5[0] != os.getpid():
                self._hdf5 = (os.getpid(), open_hdf5(self._file.path))
            file = self._hdf5[1]
            datasets = [file[name] for name in self._file.layout.moments_names]
            for i, (row, mirror) in enumerate(zip(rows, which, strict=True)):
                datasets[mirror].read_direct(out, np.s_[row], np.s_[i])
