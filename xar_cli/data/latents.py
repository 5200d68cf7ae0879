"""Samples of a latent cache, written and read.

A row counts only when its state says WRITTEN, which is set after its data is on disk. The file itself, its
datasets and attributes, is cache_file.py's; bytes are read by rows.py. Knows nothing of images, tokenizers or
torch.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xar_cli.config.schema import sides_text
from xar_cli.data.cache_file import BAD, MISSING, WRITTEN, CacheFile, CacheLayout
from xar_cli.data.rows import RowReader
from xar_cli.errors import UserError
from xar_cli.run_dir import write_at

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
            raise UserError(f"'{path}' is chunked or compressed and cannot be continued.", "Choose another --out.")
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
            UserError: finite values that the cache's dtype cannot hold.
            OSError: the disk is full or gone.
        """
        both = [moments] if moments_flip is None else [moments, moments_flip]
        if len(both) != len(self.layout.moments_names) or any(
            m.shape != (len(rows), *self.layout.row_shape) for m in both
        ):
            raise ValueError(f"moments of shape {[m.shape for m in both]} do not fit rows of {self.layout.row_shape}")
        for i, row in enumerate(rows.tolist()):
            self._write_row(row, [m[i] for m in both])

    def mark_bad(self, row: int) -> None:
        """Set a row that is not WRITTEN aside as unusable; it counts after the next `commit`.

        Whatever a process that died has left in it goes, so that equal caches are equal files.
        """
        nothing = np.zeros(self.layout.row_shape, self.layout.dtype)
        for name in self.layout.moments_names:
            self._put(row, name, nothing)
        self._put(row, "checksums", np.uint32(0))
        self._put(row, "rounding", np.zeros(2, np.float32))
        self._pending.append((row, BAD))

    def commit(self) -> None:
        """Flush all written data to disk, and only then set the states of its rows."""
        self._flush()
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self.close()

    def _flush(self) -> None:
        for shard in self._touched:
            _sync_data(self._descriptors[shard])
        self._touched.clear()

    def _write_row(self, row: int, exact: list[np.ndarray]) -> None:
        checksum, squares, largest = 0, 0.0, 0.0
        for name, values in zip(self.layout.moments_names, exact, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):  # beyond float16 lies Inf
                stored = np.ascontiguousarray(values, self.layout.dtype)
                difference = stored.astype(np.float32) - values
            if not np.isfinite(stored).all() and np.isfinite(values).all():
                raise UserError(
                    f"Moments of image {row} reach {np.abs(values).max():.3g}, which {self.layout.dtype} cannot hold.",
                    "Make another cache with --dtype float32.",
                    exit_code=1,
                )
            self._put(row, name, stored)
            checksum = zlib.crc32(stored.data, checksum)
            squares += float(np.mean(np.square(difference)))
            largest = max(largest, float(np.abs(difference).max()))
        self._put(row, "checksums", np.uint32(checksum))
        self._put(row, "rounding", np.array([(squares / len(exact)) ** 0.5, largest], np.float32))
        self._pending.append((row, WRITTEN))

    def _put(self, row: int, name: str, value: np.ndarray | np.generic) -> None:
        number = bisect_right(self._stops, row)
        shard = self.file.shards[number]
        if self._descriptors[number] < 0:
            self._descriptors[number] = os.open(shard.path, os.O_RDWR | os.O_CLOEXEC)
        data = value.tobytes()
        place = shard.offsets[name] + (row - shard.start) * len(data)
        write_at(self._descriptors[number], data, place)
        self._touched.add(number)
        self.bytes_written += len(data)


class LatentReader:
    """Reads samples of a finished cache, in any order, from any thread or process.

    It may be carried over fork, and pickled for spawn; it holds no lock. Samples are the WRITTEN rows; BAD
    ones are left out and have no number.

    Args:
        path: the cache file.
        in_memory: copy all moments to memory first, once for all processes of the machine.

    Attributes:
        num_samples: samples.
        labels: class of every sample, int64 (num_samples,).
        num_classes, class_names, class_titles: the class table: folder names and readable names, in order of
            label.
        grid: rows and columns (H, W) of tokens.
        latent_channels, latent_scale: values C per token; factor that brings latents to unit variance.
        image_size, image_channels: of the images that were encoded; the size as in `CacheLayout`.
        tokenizer: identity of the tokenizer.
        flip: whether there are moments of the mirror images.
        content_hash: equal for equal data.

    Raises:
        UserError: no such cache, a damaged, foreign or unfinished one; too little memory.
    """

    def __init__(self, path: str | Path, in_memory: bool = False) -> None:
        self.path = Path(path)
        file = CacheFile(self.path)
        if not file.is_complete:
            done = int((file.states != MISSING).sum())
            raise UserError(
                f"The latent cache '{path}' is not finished: {done} of {len(file.states)} images are done.",
                "Run the `xar cache-latents` command that made it again; it goes on from there.",
            )
        rows = np.flatnonzero(file.states == WRITTEN)
        if not len(rows):
            raise UserError(f"The latent cache '{path}' holds no samples.", "See its .bad.jsonl for why.")
        layout = file.layout
        self.layout, self.num_samples = layout, len(rows)
        self.labels = np.ascontiguousarray(file.labels[rows], np.int64)
        self.class_names, self.class_titles = file.class_names, file.class_titles
        self.num_classes = len(file.class_names)
        self.grid, self.latent_channels, self.latent_scale = (
            layout.grid,
            layout.latent_channels,
            layout.latent_scale,
        )
        self.image_size, self.image_channels = layout.image_size, layout.image_channels
        self.tokenizer, self.flip = layout.tokenizer, layout.flip
        self.content_hash = file.content_hash()
        self._row_of_sample = None if len(rows) == layout.num_samples else rows
        self._rows = RowReader(file, in_memory)

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
        which = np.zeros(len(indices), np.int64) if mirrored is None else np.asarray(mirrored, np.int64)
        if not self.flip and which.any():
            raise ValueError(f"{self.path} holds no mirror images")
        rows = indices if self._row_of_sample is None else self._row_of_sample[indices]
        return self._rows.read(rows, which), self.labels[indices]

    def check_matches(self, config: Config) -> None:
        """Raise a UserError unless the cache is one that a recipe can train on."""
        check_layout(self.path, self.layout, self.num_classes, config)

    def close(self) -> None:
        """Let go of the files; the reader cannot be used afterwards."""
        self._rows.close()

    def __enter__(self) -> LatentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_layout(path: Path, layout: CacheLayout, num_classes: int, config: Config) -> None:
    """Raise a UserError unless a recipe can train on a cache of this layout."""
    for what, have, want in (
        ("tokenizer", layout.tokenizer.split(":")[0].split("/")[0], config.tokenizer.kind),
        ("image size", sides_text(layout.image_size), sides_text(config.data.image_size)),
        ("number of image channels", layout.image_channels, config.data.image_channels),
        ("grid of tokens", sides_text(layout.grid), sides_text(config.grid)),
        ("number of latent channels", layout.latent_channels, config.latent_channels),
        ("latent scale", layout.latent_scale, config.tokenizer.latent_scale),
    ):
        if have != want:
            raise UserError(
                f"The latent cache '{path}' was made with another {what} ({have}) than recipe "
                f"'{config.name}' has "
                f"({want}).",
                f"Make a cache with `xar cache-latents --recipe {config.name}`, or choose the recipe it was made with.",
            )
    if config.data.mirror and not layout.flip:
        raise UserError(
            f"The recipe '{config.name}' trains on mirror images too, and the cache holds none.",
            "Make the cache with --flip encode, or train with --set data.mirror=false.",
        )
    if config.data.num_classes not in (0, num_classes):
        raise UserError(
            f"The latent cache '{path}' has {num_classes} classes, recipe '{config.name}' has "
            f"{config.data.num_classes}.",
            f"Add --set data.num_classes={num_classes}, or choose another cache.",
        )


def _sync_data(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
