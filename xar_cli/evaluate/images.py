"""Where the images to be judged come from: a folder, an ADM .npz, an HDF5 file, or arrays in memory.

Owns opening, checking and reading them as 8-bit RGB, their labels and their content hash. Knows nothing of networks.
Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xar_cli.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = "xar-samples"


class ImageSet(ABC):
    """Some images in a fixed order.

    Attributes:
        name: what a person calls them: a path, mostly.
        labels: (N,) int64 class of each image, or None where nobody says.
        class_names: name of each class, or None.
        manifest: what `xar sample` wrote beside the images; None for real images.
    """

    name: str
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    manifest: Mapping[str, Any] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def load(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8; grey is repeated in the three channels.

        Raises:
            UserError: the image cannot be read, or has transparent pixels or more than 8 bits.
        """

    @abstractmethod
    def content_hash(self) -> str:
        """sha256 (hex) of what the images are, wherever they lie."""

    def item_name(self, index: int) -> str:
        """What to call one image in a message."""
        return f"image {index} of '{self.name}'"


class FolderImages(ImageSet):
    """PNG and JPEG files of a folder and of the folders inside it, in sorted order.

    Labels come from `manifest.json` where `xar sample` left one, else from the first folder level, one folder a class.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)
        self.files = sorted(
            path for path in root.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )  # fmt: skip
        self.manifest = _read_manifest(root)
        if self.manifest is not None:
            self._take_manifest(self.manifest)
        elif all(path.parent != root for path in self.files):
            names = [path.relative_to(root).parts[0] for path in self.files]
            self.class_names, inverse = sorted(set(names)), np.unique(names, return_inverse=True)[1]
            self.labels = inverse.astype(np.int64)

    def _take_manifest(self, manifest: Mapping[str, Any]) -> None:
        self.files = [path for path in self.files if path.parent == self.root and path.stem.isdigit()]
        labels = manifest.get("labels")
        if labels is None:
            return
        indices = [int(path.stem) for path in self.files]
        if indices and max(indices) >= len(labels):
            raise UserError(
                f"'{self.root}' holds image {max(indices)}, and its manifest.json knows only {len(labels)}.",
                "Sample again into an empty folder.",
            )
        self.labels = np.array([labels[index] for index in indices], dtype=np.int64)
        self.class_names = manifest.get("class_names")

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> np.ndarray:
        """Decode one file."""
        return decode_image(self.files[index])

    def content_hash(self) -> str:
        """sha256 over the relative names and the bytes of all files."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(str(path.relative_to(self.root)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def item_name(self, index: int) -> str:
        """The path of the file."""
        return f"'{self.files[index]}'"


class ArrayImages(ImageSet):
    """Images in memory.

    Args:
        images: (N, H, W, 3), (N, H, W, 1) or (N, H, W) uint8.
        name: what to call them.
        labels: (N,) classes, where known.
    """

    def __init__(self, images: np.ndarray, name: str, labels: np.ndarray | None = None) -> None:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
            raise UserError(
                f"'{name}' holds an array of shape {images.shape} and type {images.dtype}.",
                "Images are (N, H, W, 3) of 8-bit integers, 0 to 255.",
            )
        self.images, self.name = images, name
        self.labels = None if labels is None else np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> np.ndarray:
        """One image of the array."""
        return np.broadcast_to(self.images[index], (*self.images.shape[1:3], 3))

    def content_hash(self) -> str:
        """sha256 over shape and pixels."""
        return hashlib.sha256(
            str(self.images.shape).encode() + np.ascontiguousarray(self.images).tobytes()
        ).hexdigest()


def open_images(source: Path | ImageSet) -> ImageSet:
    """Open images by what the path is: a folder, or an ADM `.npz` with `arr_0`.

    Raises:
        UserError: nothing there, no images in it, or not images at all.
    """
    if isinstance(source, ImageSet):
        return source
    if not source.exists():
        raise UserError(
            f"There is nothing at '{source}'.", "Give a folder of PNG or JPEG images, or an .npz batch."
        )
    images: ImageSet
    if source.is_dir():
        images = FolderImages(source)
    elif source.suffix == ".npz":
        images = _open_npz(source)
    else:
        raise UserError(
            f"'{source}' is neither a folder nor an .npz file.",
            "Give a folder of PNG or JPEG images, or an .npz batch.",
        )
    if len(images) == 0:
        raise UserError(f"'{source}' holds no PNG or JPEG image.", "Give the folder that holds the images.")
    return images


def decode_image(path: Path) -> np.ndarray:
    """One file as (H, W, 3) uint8.

    Raises:
        UserError: unreadable, more than 8 bits a channel, or pixels that are not opaque.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise UserError(f"'{path}' has more than 8 bits a channel.", "Convert it to 8-bit RGB.")
            if "A" in image.getbands() or "transparency" in image.info:
                if image.convert("RGBA").getextrema()[3][0] < 255:
                    raise UserError(
                        f"'{path}' has transparent pixels.", "Flatten it onto a background of your choice."
                    )
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read as an image ({error}).", "Replace it, or leave it out."
        ) from error


def _read_manifest(root: Path) -> Mapping[str, Any] | None:
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}).", "Sample again, or remove that file.") from error
    return manifest if isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT else None


def _open_npz(path: Path) -> ImageSet:
    with np.load(path) as arrays:
        if "arr_0" not in arrays:
            raise UserError(
                f"'{path}' holds no images (no array 'arr_0'; it has {', '.join(arrays.files)}).",
                "Give an ADM sample batch, or use the file as --reference if it holds statistics.",
            )
        labels = arrays["arr_1"] if "arr_1" in arrays else None
        return ArrayImages(arrays["arr_0"], str(path), labels)
