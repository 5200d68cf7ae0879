"""The file format of the latent cache: creating an empty one, and finding out what a file holds and where.

Layout (docs/latent-cache.md): contiguous, early-allocated datasets with one row per image, in one file per
writer; where there are several, the cache file holds virtual datasets that join them. The HDF5 structure is
complete once the file exists and is never touched again: latents.py writes and reads rows as bytes at the
datasets' offsets, so a kill cannot damage the file and reading needs no lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np

from xar_cli.config.schema import Sides, square_or_pair
from xar_cli.errors import UserError
from xar_cli.run_dir import is_file, require_writable

FORMAT = "xar-latents"
FORMAT_VERSION = 1
MISSING, WRITTEN, BAD = 0, 1, 2  # states of a row
MOMENTS = ("moments", "moments_flip")  # of the image, of its mirror image
DTYPES = ("float16", "float32")
PAGE = 4096  # datasets start on page borders, so that they can be mapped
_BYTES_PER_ROW_BESIDE_MOMENTS = 8 + 4 + 8 + 1  # labels, checksums, rounding, written
_FILE_OVERHEAD = 1 << 20


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds; written as attributes of the file, and compared when a command resumes.

    Attributes:
        num_samples: images N, one row each.
        latent_channels: values C per token; a row holds 2C channels, mean and log-variance.
        grid: rows and columns (H, W) of tokens.
        dtype: float16 or float32, as stored.
        flip: whether the moments of the mirror image are stored too.
        tokenizer: identity of the tokenizer.
        precision: arithmetic that the tokenizer encoded in: fp32, tf32, fp16 or bf16.
        latent_scale: factor that brings latents to unit variance; moments are stored unscaled.
        image_size: of the cropped image in pixels: its side, or (height, width) where it is not square.
        image_channels: 1 or 3.
        crop: name of the crop rule.
        source: sha256 over names and labels of the images, in order.
    """

    num_samples: int
    latent_channels: int
    grid: tuple[int, int]
    dtype: str
    flip: bool
    tokenizer: str
    precision: str
    latent_scale: float
    image_size: Sides
    image_channels: int
    crop: str
    source: str

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Shape (2C, H, W) of one row of moments."""
        return (2 * self.latent_channels, *self.grid)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of moments."""
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize

    @property
    def moments_names(self) -> tuple[str, ...]:
        """The datasets of moments that the cache has."""
        return MOMENTS if self.flip else MOMENTS[:1]

    def file_bytes(self, name_bytes: int = 0) -> int:
        """Bytes on disk of the whole cache; `name_bytes` is the longest image name."""
        row = self.row_bytes * len(self.moments_names) + _BYTES_PER_ROW_BESIDE_MOMENTS + name_bytes
        return row * self.num_samples + _FILE_OVERHEAD


@dataclass(frozen=True)
class Shard:
    """The rows [start, stop) of the whole cache, and the file that holds them."""

    path: Path
    start: int
    stop: int
    offsets: dict[str, int]  # of each dataset's first byte in the file


def hash_source(names: Sequence[bytes], labels: np.ndarray) -> str:
    """sha256 over the names and labels of all images, in order: tells one image set from another."""
    digest = hashlib.sha256(np.ascontiguousarray(labels, np.int64).tobytes())
    digest.update(b"\0".join(names))
    return digest.hexdigest()


def shard_paths(path: Path, count: int) -> list[Path]:
    """Files that hold the rows of a cache with `count` shards; a single one is the cache file itself."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}.shard-{i:05d}-of-{count:05d}{path.suffix}") for i in range(count)]


def leftovers(path: Path) -> list[Path]:
    """Files that a process left which was killed in `create_cache`, where `path` itself is not there: parts without
    the file that joins them, and files that were being made.

    Raises:
        UserError: a part holds rows, so that it is of a cache whose joining file was renamed or lost.
    """
    if path.exists() or not path.parent.is_dir():
        return []
    part = rf"{re.escape(path.stem)}\.shard-\d{{5,}}-of-\d{{5,}}{re.escape(path.suffix)}"
    being_made = rf"\.({re.escape(path.name)}|{part})\.\d+\.tmp"
    files = list(path.parent.iterdir())
    parts = [file for file in files if re.fullmatch(part, file.name)]
    in_use = sorted(file for file in parts if _may_hold_rows(file))
    if in_use:
        raise UserError(
            f"'{in_use[0]}' is a part of a latent cache, and the file '{path.name}' that joins its parts is not there.",
            "Choose another --out; or move the parts away, with that file if it was renamed; or remove them.",
        )
    return [*parts, *(file for file in files if re.fullmatch(being_made, file.name))]


def _may_hold_rows(part: Path) -> bool:
    """Whether a part is anything else than what `create_cache` leaves when it is killed, which has no row done."""
    try:
        with open_hdf5(part) as file:
            return bool(file["written"][:].any())
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        refused = isinstance(error, OSError) and error.errno is not None  # by the system: it may hold anything
        return refused or h5py.is_hdf5(part)


def shard_bounds(num_samples: int, count: int, unit: int = 1) -> list[tuple[int, int]]:
    """Rows [start, stop) of each shard: whole units of rows, as even as these allow; never an empty shard."""
    units = -(-num_samples // unit)
    if units < count:
        units, unit = num_samples, 1
    edges = [min(units * i // count * unit, num_samples) for i in range(count + 1)]
    return list(pairwise(edges))


def create_cache(
    path: Path,
    layout: CacheLayout,
    names: Sequence[bytes],
    labels: np.ndarray,
    class_names: Sequence[bytes],
    class_titles: Sequence[str] | None = None,
    num_shards: int = 1,
    shard_unit: int = 1,
) -> None:
    """Create an empty cache with all its space reserved; `path` comes into being last, when everything is
    there.

    Args:
        path: the cache file; its folder is created.
        layout: what it will hold.
        names: name of every image, as bytes of the file system.
        labels: class of every image, int64 (N,).
        class_names: folder name of every class.
        class_titles: readable name of every class; the folder names again if None.
        num_shards: files to divide the rows over, one per writer; at most one per image.
        shard_unit: rows that a writer makes together, and that stay in one file.

    Raises:
        UserError: the folder cannot be written, or its disk is too small.
    """
    count = layout.num_samples
    longest = max(map(len, names), default=1)
    require_writable(path.parent, layout.file_bytes(longest), "the latent cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = class_names if class_titles is None else [title.encode() for title in class_titles]
    paths, bounds = shard_paths(path, num_shards), shard_bounds(count, num_shards, shard_unit)
    rows: dict[str, tuple[tuple[int, ...], str]] = {
        name: (layout.row_shape, layout.dtype) for name in layout.moments_names
    }
    rows |= {
        "written": ((), "u1"),
        "labels": ((), "<i8"),
        "checksums": ((), "<u4"),
        "rounding": ((2,), "<f4"),
    }
    rows["names"] = ((), f"S{max(longest, 1)}")

    for shard_path, (start, stop) in zip(paths, bounds, strict=True):
        with _new_file(shard_path) as file:
            _write_tables(file, layout, class_names, titles)
            file.attrs["first_row"] = start
            for name, (shape, dtype) in rows.items():
                create_contiguous(file, name, (stop - start, *shape), np.dtype(dtype))
            file["labels"][:] = labels[start:stop]
            file["names"][:] = np.asarray(list(names[start:stop]), dtype=rows["names"][1])
    if num_shards > 1:
        with _new_file(path) as file:
            _write_tables(file, layout, class_names, titles)
            for name, (shape, dtype) in rows.items():
                virtual = h5py.VirtualLayout((count, *shape), np.dtype(dtype))
                for shard_path, (start, stop) in zip(paths, bounds, strict=True):
                    virtual[start:stop] = h5py.VirtualSource(shard_path.name, name, (stop - start, *shape))
                file.create_virtual_dataset(name, virtual)
    _sync_folder(path.parent)


class CacheFile:
    """What a cache file says of itself, read once: no handle stays open.

    Attributes:
        path: the file.
        layout: what it holds.
        shards: where the rows lie, in order of rows; empty for a file that only HDF5 itself can read
            (chunked, compressed).
        labels: int64 (N,).
        states: uint8 (N,), MISSING, WRITTEN or BAD.
        checksums: crc32 of each row, uint32 (N,); None in files by others.
        class_names, class_titles: the class table, as text.

    Raises:
        UserError: a missing, truncated or foreign file, another format version, a shard that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not is_file(self.path):
            raise UserError(
                f"There is no latent cache '{path}'.", "Make it with `xar cache-latents`, or check the path."
            )
        try:
            with open_hdf5(self.path) as file:
                self._read(file)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"'{path}' cannot be read as a latent cache: {error}.",
                "It is truncated or not HDF5: copy it again, or make it anew with `xar cache-latents`.",
            ) from None

    def _read(self, file: h5py.File) -> None:
        kind, version = file.attrs.get("format"), file.attrs.get("format_version")
        if kind != FORMAT:
            raise UserError(
                f"'{self.path}' is an HDF5 file, but no latent cache.",
                "Give the file that `xar cache-latents` wrote.",
            )
        if version != FORMAT_VERSION:
            raise UserError(
                f"'{self.path}' has format version {version}; this program reads version {FORMAT_VERSION}.",
                "Make the cache anew, or use the version of xar that made it.",
            )
        self.layout = _read_layout(file)
        for name in self.layout.moments_names:
            expected = (self.layout.num_samples, *self.layout.row_shape)
            if file[name].shape != expected:
                raise UserError(
                    f"'{self.path}' is damaged: {name} has shape {file[name].shape}, not {expected}.",
                    "Make it anew.",
                )
        self.shards = _find_shards(self.path, file, self.layout)
        self.labels: np.ndarray = file["labels"][:]
        self.states: np.ndarray = file["written"][:]
        self.checksums: np.ndarray | None = file["checksums"][:] if "checksums" in file else None
        self.class_names = tuple(_text(name) for name in file["class_names"][:])
        self.class_titles = tuple(_text(name) for name in file["class_titles"][:])

    def names(self) -> list[bytes] | None:
        """The name of every image, as the bytes of the file system; None in files by others."""
        with open_hdf5(self.path) as file:
            return list(file["names"][:]) if "names" in file else None

    def rounding(self) -> np.ndarray:
        """What storing cost each row: float32 (N, 2), root mean square and largest error of the stored
        moments.
        """
        with open_hdf5(self.path) as file:
            return np.asarray(file["rounding"][:])

    @property
    def is_complete(self) -> bool:
        """Whether no row is missing."""
        return not (self.states == MISSING).any()

    def content_hash(self) -> str:
        """sha256 over layout, labels, states and checksums: equal for equal data, wherever and however it was
        made.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.layout), sort_keys=True).encode())
        digest.update("\0".join(self.class_names).encode())
        for array in (self.labels, self.states, self.checksums):
            if array is not None:
                digest.update(array.tobytes())
        return digest.hexdigest()


def open_hdf5(path: Path) -> h5py.File:
    """The file through HDF5, without its lock; or with it where this process has it open so already."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError:
        return h5py.File(path, "r")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


@contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file written beside its place, given its space on the disk, and renamed into place: whole or
    not at all.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w", alignment_threshold=PAGE, alignment_interval=PAGE) as file:
            yield file
        reserve_and_sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_tables(file: h5py.File, layout: CacheLayout, class_names: Sequence[bytes], titles: Sequence[bytes]) -> None:
    """Attributes, and the class table: as datasets, since HDF5 attributes end at 64 KB."""
    file.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(layout)})
    for name, texts in (("class_names", class_names), ("class_titles", titles)):
        width = max(map(len, texts), default=1)
        file.create_dataset(name, data=np.asarray(list(texts), dtype=f"S{max(width, 1)}"))


def create_contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """A dataset whose bytes have their place in the file from now on; new space reads as zeros."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # equal caches are equal files
    h5py.h5d.create(
        file.id,
        name.encode(),
        h5py.h5t.py_create(dtype, logical=True),
        h5py.h5s.create_simple(shape),
        properties,
    )


def _read_layout(file: h5py.File) -> CacheLayout:
    values = {field.name: file.attrs[field.name] for field in fields(CacheLayout)}
    values["grid"] = tuple(int(side) for side in values["grid"])
    values["image_size"] = square_or_pair(np.asarray(values["image_size"]).tolist())
    for name in ("num_samples", "latent_channels", "image_channels"):
        values[name] = int(values[name])
    values["flip"], values["latent_scale"] = bool(values["flip"]), float(values["latent_scale"])
    return CacheLayout(**values)


def _find_shards(path: Path, file: h5py.File, layout: CacheLayout) -> list[Shard]:
    """Where the rows of each dataset lie as plain bytes; empty if they do not (chunked, compressed, foreign
    byte order).
    """
    first = file["moments"]
    if not first.is_virtual:
        shard = _plain_shard(path, file, 0, layout)
        return [shard] if shard else []
    shards = []
    for source in first.virtual_sources():
        (start, *_), (last, *_) = source.vspace.get_select_bounds()
        part_space = source.src_space
        from_start = part_space.get_select_type() == h5py.h5s.SEL_ALL or not any(part_space.get_select_bounds()[0])
        if source.dset_name != "moments" or not from_start:
            return []  # joined by someone else, in another way
        shard_path = path.resolve().parent / source.file_name
        if not shard_path.is_file():
            raise UserError(
                f"The latent cache '{path}' lacks its part '{source.file_name}'.",
                f"Put that file beside '{path.name}'.",
            )
        with open_hdf5(shard_path) as part:
            shard = _plain_shard(shard_path, part, int(start), layout)
            if shard is None:
                return []
            if part.attrs.get("format") == FORMAT and not _is_part_of(part, layout, int(start)):
                raise UserError(
                    f"'{shard_path}' belongs to another latent cache than '{path}', or holds other rows of it.",
                    "Put the part there that was made with it, or make the cache anew.",
                )
        if shard.stop != last + 1:
            return []
        shards.append(shard)
    return sorted(shards, key=lambda shard: shard.start)


def _is_part_of(part: h5py.File, layout: CacheLayout, start: int) -> bool:
    """Whether a part that says of itself what a cache does (one by another program does not) is part of this one."""
    return _read_layout(part) == layout and part.attrs.get("first_row", start) == start


def _plain_shard(path: Path, file: h5py.File, start: int, layout: CacheLayout) -> Shard | None:
    size, offsets = path.stat().st_size, {}
    for name, dataset in file.items():
        offset = dataset.id.get_offset() if isinstance(dataset, h5py.Dataset) else None
        if offset is not None:
            offsets[name] = int(offset)
    for name in layout.moments_names:
        if name not in offsets or file[name].dtype != np.dtype(layout.dtype) or file[name].chunks:
            return None
        if offsets[name] + len(file[name]) * layout.row_bytes > size:
            raise UserError(f"'{path}' is truncated: it has {size} bytes and should have more.", "Copy it again.")
    return Shard(path, start, start + len(file["moments"]), offsets)


def reserve_and_sync(path: Path) -> None:
    """Give every byte of a file its place on the disk now, so that a full disk shows before the work and not
    in it.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
                    raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last, where the system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot sync folders
    finally:
        os.close(descriptor)
