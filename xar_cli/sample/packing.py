"""All images of a folder as one file: `.npz` in the layout of ADM's evaluator, or HDF5.

Images go through memory a few at a time, and the file takes its place when it is whole.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from xar_cli.config.schema import height_and_width
from xar_cli.data.cache_file import create_contiguous, reserve_and_sync
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.sample.images import image_path, is_whole, load_images

SECONDS_WITHOUT_NEWS = 600.0  # another process that makes no image for so long has died, unless batches take as long
BATCHES_WITHOUT_NEWS = 5  # images come a batch at a time, and other processes may be slower


def pack_path(folder: Path, pack: str) -> Path:
    """Where the packed file of a folder goes: beside the images."""
    return folder / {"npz": "samples.npz", "hdf5": "samples.h5"}[pack]


def pack_is_current(folder: Path, manifest: Mapping[str, Any], pack: str) -> bool:
    """Whether the packed file is there and holds as many images as the manifest asks for."""
    path = pack_path(folder, pack)
    try:
        return (_count_npz(path) if pack == "npz" else _count_hdf5(path)) == manifest["count"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # none there, or damaged
        return False


def _count_npz(path: Path) -> int:
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return int(shape[0])


def _count_hdf5(path: Path) -> int:
    with h5py.File(path) as file:
        return int(file["images"].shape[0])


def pack_bytes(manifest: Mapping[str, Any], pack: str) -> int:
    """Size of a packed file, labels and headers left out."""
    height, width = height_and_width(manifest["image_size"])
    return int(manifest["count"] * height * width * (3 if pack == "npz" else manifest["image_channels"]))


def write_pack(folder: Path, manifest: Mapping[str, Any], pack: str) -> Path:
    """Write the images 0 .. count - 1 of a folder, all of them whole, as one file.

    - `npz`: `arr_0` (N, H, W, 3) uint8, grey images with three equal channels, and `arr_1` (N,) int64 labels.
    - `hdf5`: `images` (N, H, W, channels) uint8 and `labels` (N,) int64; the manifest is the attribute `manifest`.

    Raises:
        OSError: the disk is full; no part of the file is left.
        UserError: an image is damaged; it has been removed (exit code 1).
    """
    with _into_place(pack_path(folder, pack)) as temporary:
        (_write_npz if pack == "npz" else _write_hdf5)(folder, manifest, temporary)
    return pack_path(folder, pack)


def patience_for(slowest_batch: float) -> float:
    """How long to wait without news for the images of other processes, by the seconds of this one's slowest batch."""
    return max(SECONDS_WITHOUT_NEWS, BATCHES_WITHOUT_NEWS * slowest_batch)


def wait_for_images(
    folder: Path, count: int, sleep: Callable[[float], None] = time.sleep, patience: float = SECONDS_WITHOUT_NEWS
) -> None:
    """Wait until other processes have written the first `count` images: the files tell, nobody is held up.

    Raises:
        UserError: no new image for `patience` seconds (exit code 1).
    """
    missing = [index for index in range(count) if not is_whole(image_path(folder, index))]
    if missing:
        log.info("Waiting for %d images of the other processes.", len(missing))
    waited, pause = 0.0, 1.0
    while missing:
        if waited > patience:
            raise UserError(
                f"{len(missing)} images of other processes are missing, and none has come for {patience:.0f} seconds.",
                "The same command makes them.",
                exit_code=1,
            )
        sleep(pause)
        still = [index for index in missing if not is_whole(image_path(folder, index))]
        waited = 0.0 if len(still) < len(missing) else waited + pause
        missing = still


def _write_npz(folder: Path, manifest: Mapping[str, Any], path: Path) -> None:
    """An uncompressed zip of two .npy members, as numpy.savez writes it, image after image."""
    count, (height, width) = manifest["count"], height_and_width(manifest["image_size"])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _npy_header(file, (count, height, width, 3), np.dtype(np.uint8))
            for image in _read_images(folder, manifest):
                file.write(np.broadcast_to(image, (height, width, 3)).tobytes())
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            _npy_header(file, (count,), np.dtype(np.int64))
            file.write(np.asarray(manifest["labels"], dtype=np.int64).tobytes())


def _npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    description = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(file, description)


def _write_hdf5(folder: Path, manifest: Mapping[str, Any], path: Path) -> None:
    """The structure first, then space for all of the file, then the rows as bytes.

    HDF5 keeps rows in a cache. Where the disk is full it fails when the file is closed, and again when Python ends.
    """
    shape = (manifest["count"], *height_and_width(manifest["image_size"]), manifest["image_channels"])
    with h5py.File(path, "w") as file:
        create_contiguous(file, "images", shape, np.dtype(np.uint8))
        create_contiguous(file, "labels", shape[:1], np.dtype(np.int64))
        file.attrs["manifest"] = json.dumps({key: manifest[key] for key in manifest if key != "labels"})
        places = {name: file[name].id.get_offset() for name in ("images", "labels")}
    reserve_and_sync(path)
    with path.open("r+b") as rows:
        rows.seek(places["images"])
        for image in _read_images(folder, manifest):
            rows.write(image.tobytes())
        rows.seek(places["labels"])
        rows.write(np.asarray(manifest["labels"], dtype=np.int64).tobytes())


def _read_images(folder: Path, manifest: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """(H, W, channels) uint8, in order of index."""
    height, width = height_and_width(manifest["image_size"])
    mode = "L" if manifest["image_channels"] == 1 else "RGB"
    for image in load_images(folder, range(manifest["count"]), (width, height)):
        yield np.asarray(image.convert(mode)).reshape(height, width, -1)


@contextmanager
def _into_place(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
