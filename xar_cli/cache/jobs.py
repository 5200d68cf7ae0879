"""What a row of a cache is made from: an image that is encoded, or moments that MAR stored already.

A job says how many rows there are, loads one (from any thread) and turns a block of them into moments. The
flow between those steps is pipeline.py's.
"""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from xar_cli.config.schema import Sides, height_and_width
from xar_cli.data.archives import is_archive, open_archive
from xar_cli.data.images import BadImageError, ImageFolder, ImageSource, list_classes, printable, read_failure
from xar_cli.errors import UserError
from xar_cli.tokenizer import Codec

MAR_KEYS = ("moments", "moments_flip")
_ONE_HEADER_AT_A_TIME = threading.Lock()
PROBED = 16  # files of MAR's cache, from first to last, of which one must fit


class Job(Protocol):
    """What the pipeline makes rows from.

    Attributes:
        class_names, names, labels: as in `ImageSource`.
        item_shape, item_dtype: of what `load` gives.
    """

    class_names: tuple[str, ...]
    names: list[str]
    labels: np.ndarray
    item_shape: tuple[int, ...]
    item_dtype: np.dtype

    def load(self, row: int) -> np.ndarray:
        """What row `row` is made from, or BadImageError."""
        ...

    def encode(self, items: np.ndarray) -> list[Tensor]:
        """Moments (B, 2C, H, W) of a block of items (B, *item_shape): of the images, then of their mirror
        images.
        """
        ...


class EncodeImages:
    """Images through the tokenizer (a `Job`).

    Args:
        source: the images.
        codec: the tokenizer.
        image_size: of the crop in pixels: one side, or (height, width).
        flip: whether to encode the mirror images too.
        device: where the tokenizer runs.
    """

    item_dtype: np.dtype = np.dtype(np.uint8)

    def __init__(self, source: ImageSource, codec: Codec, image_size: Sides, flip: bool, device: torch.device) -> None:
        self.class_names, self.names, self.labels = source.class_names, source.names, source.labels
        self.source, self.codec, self.image_size, self.flip, self.device = (
            source,
            codec,
            image_size,
            flip,
            device,
        )
        self.image_channels = codec.tokenizer.image_channels
        self.item_shape: tuple[int, ...] = (self.image_channels, *height_and_width(image_size))

    def load(self, row: int) -> np.ndarray:
        """The cropped image, uint8 (channels, height, width)."""
        return self.source.load(row, self.image_size, self.image_channels)

    def encode(self, items: np.ndarray) -> list[Tensor]:
        """Moments of uint8 images (B, channels, height, width), on the tokenizer's device."""
        images = torch.from_numpy(items)
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        moments = [self.codec.moments(images)]
        if self.flip:
            moments.append(self.codec.moments(images.flip(-1)))
        return moments


class ConvertMar:
    """MAR's cache, a folder of `<class>/<image>.npz`, taken over without encoding (a `Job`).

    Args:
        root: the folder.
        row_shape: shape (2C, H, W) that the recipe gives a row of moments.
        flip: whether to take the moments of the mirror images too.

    Raises:
        UserError: no such folder, nothing in it, or nothing of this shape.
    """

    item_dtype: np.dtype = np.dtype(np.float32)

    def __init__(self, root: Path, row_shape: tuple[int, int, int], flip: bool) -> None:
        self.root, self.row_shape = root, row_shape
        self.keys = MAR_KEYS if flip else MAR_KEYS[:1]
        self.item_shape: tuple[int, ...] = (len(self.keys), *row_shape)
        self.class_names, self.names, self.labels = list_classes(root, frozenset((".npz",)), "files of MAR's cache")
        self._require_one_that_fits()

    def load(self, row: int) -> np.ndarray:
        """The stored moments, float32 (1 or 2, 2C, H, W)."""
        path = self.root / self.names[row]
        try:
            with zipfile.ZipFile(path) as archive:
                moments = np.stack([_read_npy(archive, key) for key in self.keys]).astype(np.float32, copy=False)
        except Exception as error:  # damaged files make NumPy's readers raise nearly anything
            raise read_failure(str(path), error) from None
        if moments.shape != self.item_shape:
            raise BadImageError(str(path), f"its moments have shape {moments.shape[1:]}, not {self.row_shape}")
        if not np.isfinite(moments).all():
            raise BadImageError(str(path), "its moments are not finite")
        return moments

    def encode(self, items: np.ndarray) -> list[Tensor]:
        """The moments as they are, one array for the images and one for the mirror images."""
        return [torch.from_numpy(items[:, i]) for i in range(len(self.keys))]

    def _require_one_that_fits(self) -> None:
        first: BadImageError | None = None
        for row in np.linspace(0, len(self.names) - 1, min(PROBED, len(self.names))).astype(int).tolist():
            try:
                self.load(row)
                return
            except BadImageError as error:
                first = first or error
        assert first is not None  # there is at least one file
        raise UserError(
            f"'{printable(str(self.root))}' is no cache of MAR that fits the recipe: "
            f"'{printable(first.name)}': {first.reason}.",
            "Give the folder that MAR's caching wrote, and the recipe of its image size.",
        )


def _read_npy(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array of an npz. As np.load reads it, but for the headers: those are parsed one at a time, since Python 3.11
    fails now and then ("AST constructor recursion depth mismatch") where several threads do that.
    """
    with archive.open(f"{key}.npy") as file:
        is_first = np.lib.format.read_magic(file) == (1, 0)
        with _ONE_HEADER_AT_A_TIME:
            read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if is_fortran else "C")


def open_images(path: Path) -> ImageSource:
    """The images in a folder, a `.tar` or a `.zip`."""
    return open_archive(path) if is_archive(path) else ImageFolder(path)
