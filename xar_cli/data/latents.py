"""Writing and reading the rows of a latent cache, as bytes at the datasets' offsets in the file.

A row counts only when its state says WRITTEN, which is set after its data is on disk. Reading survives fork
and spawn and needs no lock. The file itself, its datasets and attributes, is cache_file.py's. Knows nothing
of images, tokenizers or torch.
"""

from __future__ import annotations

import os
import threading
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from xar_cli.data.cache_file import BAD, MISSING, WRITTEN, CacheFile, open_hdf5
from xar_cli.errors import UserError

if TYPE_CHECKING:
    from xar_cli.config import Config


class LatentWriter:
    """Writes rows into a cache that `create_cache` made. Several may write to one cache, each to rows of its
    own.

    A row is WRITTEN only once `commit` has flushed its data; a process that dies before leaves it MISSING.

    Args:
        path: the cache file.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = CacheFile(path)
        if not self.file.shards:
            raise UserError(
                f"'{path}' is chunked or compressed and cannot be continued.", "Choose another --out."
            )
        self.layout = self.file.layout
        self.states = self.file.states.copy()
        self._stops = [shard.stop for shard in self.file.shards]
        self._descriptors = [-1] * len(self.file.shards)
        self._pending: list[tuple[int, int]] = []  # (row, state), not yet flushed
        self._touched: set[int] = set()
        self.bytes_written = 0

    def write(self, rows: np.ndarray, moments: np.ndarray, moments_flip: np.ndarray | None = None) -> None:
        """Write the moments of some images; they count after the next `commit`.

        Args:
            rows: which images, int64 (B,).
            moments: (B, 2C, H, W), float32.
            moments_flip: the same of the mirror images; None without flip.

        Raises:
            ValueError: a shape that does not fit the cache.
            OSError: the disk is full or gone.
        """
        both = [moments] if moments_flip is None else [moments, moments_flip]
        if len(both) != len(self.layout.moments_names) or any(
            m.shape != (len(rows), *self.layout.row_shape) for m in both
        ):
            raise ValueError(
                f"moments of shape {[m.shape for m in both]} do not fit rows of {self.layout.row_shape}"
            )
        with np.errstate(over="ignore"):  # a value beyond float16 becomes Inf: counted by `verify`
            stored = [np.ascontiguousarray(m, self.layout.dtype) for m in both]
        for i, row in enumerate(rows.tolist()):
            checksum, squares, largest = 0, 0.0, 0.0
            for name, exact, kept in zip(self.layout.moments_names, both, stored, strict=True):
                self._put(row, name, kept[i])
                checksum = zlib.crc32(kept[i], checksum)
                difference = kept[i].astype(np.float32) - exact[i]
                squares += float(np.mean(np.square(difference)))
                largest = max(largest, float(np.abs(difference).max()))
            self._put(row, "checksums", np.uint32(checksum))
            self._put(row, "rounding", np.array([(squares / len(both)) ** 0.5, largest], np.float32))
            self._pending.append((row, WRITTEN))

    def mark_bad(self, row: int) -> None:
        """Set a row aside as unusable; it counts after the next `commit`."""
        self._pending.append((row, BAD))

    def commit(self) -> None:
        """Flush all written data to disk, and only then set the states of its rows."""
        for shard in self._touched:
            _sync_data(self._descriptors[shard])
        self._touched.clear()
        for row, state in self._pending:
            self._put(row, "written", np.uint8(state))
            self.states[row] = state
        self._pending.clear()

    def close(self) -> None:
        """Let go of the files. What was not committed stays MISSING."""
        for shard, descriptor in enumerate(self._descriptors):
            if descriptor >= 0:
                os.close(descriptor)
                self._descriptors[shard] = -1

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, row: int, name: str, value: np.ndarray | np.generic) -> None:
        number = bisect_right(self._stops, row)
        shard = self.file.shards[number]
        if self._descriptors[number] < 0:
            self._descriptors[number] = _open_bytes(shard.path, os.O_RDWR)
        data = value.tobytes()
        place = shard.offsets[name] + (row - shard.start) * len(data)
        view = memoryview(data)
        while view:
            done = os.pwrite(self._descriptors[number], view, place)
            view, place = view[done:], place + done
        self._touched.add(number)
        self.bytes_written += len(data)


class LatentReader:
    """Reads samples of a finished cache, in any order, from any thread or process.

    Bytes come straight from the dataset's offset, without HDF5 and its lock; the object may be carried over
    fork, and pickled for spawn. A file that is chunked or compressed is read through h5py, more slowly.
    Samples are the WRITTEN rows; BAD ones are left out and have no number.

    Args:
        path: the cache file.
        in_memory: copy all moments to memory first, once for all processes of the machine (see memory.py).

    Attributes:
        num_samples, num_classes, class_names, class_titles, grid (H, W), latent_channels, latent_scale,
        image_size, image_channels, tokenizer (identity), flip, content_hash; labels, int64 (num_samples,).

    Raises:
        UserError: no such cache, a damaged, foreign or unfinished one.
    """

    _descriptors: list[int]

    def __init__(self, path: str | Path, in_memory: bool = False) -> None:
        self.path = Path(path)
        file = CacheFile(self.path)
        if not file.is_complete:
            done = int((file.states != MISSING).sum())
            raise UserError(
                f"The latent cache '{path}' is not finished: {done} of {len(file.states)} images are done.",
                "Run the `xar cache-latents` command that made it again; it goes on from there.",
            )
        layout = file.layout
        self.layout = layout
        rows = np.flatnonzero(file.states == WRITTEN)
        if not len(rows):
            raise UserError(f"The latent cache '{path}' holds no samples.", "See its .bad.jsonl for why.")
        self._rows = None if len(rows) == layout.num_samples else rows
        self.labels = np.ascontiguousarray(file.labels[rows], np.int64)
        self.num_samples = len(rows)
        self.class_names, self.class_titles = file.class_names, file.class_titles
        self.num_classes = len(self.class_names)
        self.grid, self.latent_channels, self.latent_scale = (
            layout.grid,
            layout.latent_channels,
            layout.latent_scale,
        )
        self.image_size, self.image_channels = layout.image_size, layout.image_channels
        self.tokenizer, self.flip = layout.tokenizer, layout.flip
        self.content_hash = file.content_hash()
        self.dtype = np.dtype(layout.dtype)
        self._shards = file.shards
        self._starts = np.array([shard.start for shard in self._shards])
        self._bases = np.array(
            [[shard.offsets[name] for name in layout.moments_names] for shard in self._shards]
        )
        self._lock = threading.Lock()
        self._open_files()

    def read(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read some samples; safe to call from several threads at once.

        Args:
            indices: int64 (B,), 0 to num_samples - 1.
            mirrored: bool (B,), which of them to take from the mirror image; None for none.

        Returns:
            moments (B, 2C, H, W) in the stored dtype, unscaled, and labels int64 (B,).

        Raises:
            IndexError: an index out of range.
            ValueError: mirror images asked of a cache that has none.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.num_samples):
            raise IndexError(f"a sample number outside 0 to {self.num_samples - 1}")
        which = (
            np.zeros(len(indices), np.int64)
            if mirrored is None
            else np.asarray(mirrored, np.bool_).astype(np.int64)
        )
        if not self.flip and which.any():
            raise ValueError(f"{self.path} holds no mirror images")
        rows = indices if self._rows is None else self._rows[indices]
        moments = np.empty((len(rows), *self.layout.row_shape), self.dtype)
        if self._shards:
            self._read_bytes(rows, which, moments)
        else:
            self._read_hdf5(rows, which, moments)
        return moments, self.labels[indices]

    def check_matches(self, config: Config) -> None:
        """Raise a UserError unless the cache is one that a recipe can train on."""
        kind = self.tokenizer.split(":")[0].split("/")[0]
        expected_tokenizer = config.tokenizer.kind
        for what, have, want in (
            ("tokenizer", kind, expected_tokenizer),
            ("image size", self.image_size, config.data.image_size),
            ("number of image channels", self.image_channels, config.data.image_channels),
            ("grid of tokens", self.grid, config.grid),
            ("number of latent channels", self.latent_channels, config.latent_channels),
            ("latent scale", self.latent_scale, config.tokenizer.latent_scale),
        ):
            if have != want:
                raise UserError(
                    f"The latent cache '{self.path}' was made with another {what} ({have}) than recipe "
                    f"'{config.name}' has ({want}).",
                    f"Make a cache with `xar cache-latents --recipe {config.name}`, or choose the recipe "
                    "that it was made with.",
                )
        if config.data.num_classes not in (0, self.num_classes):
            raise UserError(
                f"The latent cache '{self.path}' has {self.num_classes} classes, recipe '{config.name}' has "
                f"{config.data.num_classes}.",
                f"Add --set data.num_classes={self.num_classes}, or choose another cache.",
            )

    def close(self) -> None:
        """Let go of the files; the reader cannot be used afterwards."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)

    def __enter__(self) -> LatentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptors", None):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_descriptors"], state["_lock"], state["_hdf5"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._open_files()

    def _open_files(self) -> None:
        self._descriptors = [
            os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) for shard in self._shards
        ]
        self._hdf5: tuple[int, h5py.File] | None = None

    def _read_bytes(self, rows: np.ndarray, which: np.ndarray, out: np.ndarray) -> None:
        size = self.layout.row_bytes
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = (self._bases[shards, which] + (rows - self._starts[shards]) * size).tolist()
        view, descriptors = memoryview(out).cast("B"), self._descriptors  # type: ignore[arg-type]
        for i, (shard, place) in enumerate(zip(shards.tolist(), places, strict=True)):
            part = view[i * size : (i + 1) * size]
            if os.preadv(descriptors[shard], [part], place) != size:
                self._read_again(descriptors[shard], part, place)

    def _read_again(self, descriptor: int, part: memoryview, place: int) -> None:
        """Read what a single call did not give in one piece (a signal, a network disk)."""
        while part:
            done = os.preadv(descriptor, [part], place)
            if not done:
                raise OSError(f"{self.path}: the file has become shorter while it was being read")
            part, place = part[done:], place + done

    def _read_hdf5(self, rows: np.ndarray, which: np.ndarray, out: np.ndarray) -> None:
        """Read through h5py, with a handle of this process (a handle must not cross fork)."""
        with self._lock:
            if self._hdf5 is None or self._hdf5[0] != os.getpid():
                self._hdf5 = (os.getpid(), open_hdf5(self.path))
            file = self._hdf5[1]
            datasets = [file[name] for name in self.layout.moments_names]
            for i, (row, mirror) in enumerate(zip(rows.tolist(), which.tolist(), strict=True)):
                datasets[mirror].read_direct(out, np.s_[row], np.s_[i])


def _open_bytes(path: Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_CLOEXEC", 0))


def _sync_data(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
