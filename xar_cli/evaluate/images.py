"""Where the images to be judged come from: a folder, an ADM .npz, an HDF5 file, arrays, or a generator.

Owns opening, checking and reading them as 8-bit RGB, their labels, and what tells them from others. Knows nothing of
networks. Legend: N images of H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from PIL import ExifTags, Image

from xar_cli.config.schema import Sides, height_and_width, sides_text
from xar_cli.data.images import (
    BadImageError,
    is_image_name,
    load_image,
    open_regular,
    printable,
    read_failure,
    walk,
)
from xar_cli.errors import UserError
from xar_cli.evaluate.manifest import MANIFEST, has_classes, manifest_of_folder, manifest_of_hdf5, manifest_of_npz
from xar_cli.evaluate.npz import IMAGES, StoredRows, read_npz
from xar_cli.logs import log
from xar_cli.run_dir import is_there

HDF5_SUFFIXES = (".h5", ".hdf5")
HASH_BLOCK = 256  # images hashed at a time
IMAGES_IN_OUTLINE = 16


class ImageSet(ABC):
    """Some images in a fixed order.

    Attributes:
        name: what a person calls them: a path, mostly; text that any file takes, as the class names are.
        labels: (N,) int64 class of each image, or None where nobody says.
        class_names: name of each class, or None.
        manifest: what `xar sample` wrote beside the images; None for real images.
        generated: whether they come out of a model while they are read.
        keep_features: whether their features are worth keeping.
    """

    name: str
    labels: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    manifest: Mapping[str, Any] | None = None
    generated = False
    keep_features = True

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def load(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8; grey is repeated in the three channels.

        Raises:
            BadImageError: the image cannot be read or judged.
            UserError: the machine failed.
        """

    @abstractmethod
    def content_hash(self) -> str:
        """sha256 (hex) of what the images are, wherever they lie."""

    @abstractmethod
    def outline(self) -> str:
        """What tells these images from others before they are read, wherever they lie."""

    def load_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Several images; a generator draws them together."""
        return [self.load(index) for index in indices]

    def item_name(self, index: int) -> str:
        """What to call one image in a message."""
        return f"image {index} of {self.name}"

    def class_name(self, label: int) -> str:
        """What to call a class."""
        return str(self.class_names[label]) if self.class_names else str(label)

    def class_caption(self, label: int) -> str:
        """Its name where no other class has the same; else with its number, as ImageNet's two kinds of crane need."""
        name = self.class_name(label)
        shared = self.class_names is not None and list(self.class_names).count(name) > 1
        return f"{name} ({label})" if shared else name


class FolderImages(ImageSet):
    """The images of a folder and the folders inside it, sorted by path as torch-fidelity and clean-fid sort.

    Labels come from `manifest.json` where `xar sample` left one, else from the first folder level, one folder a class.
    Where images lie beside such folders, all count, as with both libraries, and none has a class.

    Args:
        root: the folder.
        image_size: None takes each file as it is; a side, or (height, width), takes ADM's centre crop of that size.

    Raises:
        UserError: a folder that cannot be read, or a link that leads back to a folder above it.
    """

    def __init__(self, root: Path, image_size: Sides | None = None) -> None:
        self.root, self.name, self.image_size = root, printable(str(root)), image_size
        self.manifest = manifest_of_folder(root)
        names = sorted(name for name in walk(root) if is_image_name(name))
        self.files = [root / name for name in names]
        inside = [name.partition("/")[0] for name in names if "/" in name]
        if self.manifest is not None:
            self._label_by_manifest(self.manifest)
        elif inside and len(inside) == len(names):
            classes, self.labels = np.unique(inside, return_inverse=True)
            self.class_names = [printable(name) for name in classes.tolist()]
        elif inside:
            beside = len(names) - len(inside)
            log.warning(f"{beside} images lie beside the folders of '{self.name}': all count, and none has a class")

    def _label_by_manifest(self, manifest: Mapping[str, Any]) -> None:
        self.files = [path for path in self.files if path.parent == self.root and path.stem.isdecimal()]
        indices = [int(path.stem) for path in self.files]
        named: dict[int, str] = {}
        for index, path in zip(indices, self.files, strict=True):
            if index in named:
                raise UserError(
                    f"'{self.name}' holds image {index} twice: {named[index]} and {path.name}.", "Remove one of them."
                )
            named[index] = path.name
        count = manifest.get("count")
        if isinstance(count, int) and len(indices) < count:
            log.warning(f"'{self.name}' holds {len(indices)} of the {count} images that its {MANIFEST} tells of")
        if not manifest.get("labels") or not has_classes(manifest):
            return
        labels = checked_labels(manifest["labels"], f"{self.name}/{MANIFEST}", manifest.get("class_names"))
        if indices and max(indices) >= len(labels):
            raise UserError(
                f"'{self.root}' holds image {max(indices)}, and its {MANIFEST} knows only {len(labels)}.",
                "Sample again into an empty folder.",
            )
        self.labels = labels[indices]
        self.class_names = manifest.get("class_names")

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> np.ndarray:
        """Decode one file."""
        path = self.files[index]
        if self.image_size is None:
            return decode_opaque(path)
        return load_image(path, self.image_size, 3).transpose(1, 2, 0)

    def content_hash(self) -> str:
        """sha256 over the relative names and the bytes of all files that can be read, and the crop.

        Raises:
            UserError: the machine failed.
        """
        digest = hashlib.sha256(f"crop {self.image_size}\n".encode())
        for path in self.files:
            digest.update(str(path.relative_to(self.root)).encode(errors="surrogateescape") + b"\0")
            digest.update(_hash_of_file(path))
        return digest.hexdigest()

    def outline(self) -> str:
        """sha256 over the relative names and the sizes of all files, and the crop."""
        digest = hashlib.sha256(f"crop {self.image_size}\n".encode())
        for path, status in self._statuses():
            told = status.st_size if status else "unreadable"
            digest.update(f"{path.relative_to(self.root)}\0{told}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """sha256 over what the system tells of the files: while it stays the same, so does the content hash.

        `tar`, `rsync` and `cp -p` set the time of modification, and images of one size may have files of one length;
        the time of change and the number of a file nobody sets.
        """
        digest = hashlib.sha256(f"{self.root.absolute()}\ncrop {self.image_size}\n".encode())
        for path, status in self._statuses():
            told = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino) if status else "unreadable"
            digest.update(f"{path}\0{told}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _statuses(self) -> Iterator[tuple[Path, os.stat_result | None]]:
        """What the system tells of each file; nothing of one that cannot be read."""
        for path in self.files:
            yield path, path.stat() if os.access(path, os.R_OK) else None

    def item_name(self, index: int) -> str:
        """The path of the file."""
        return f"'{printable(str(self.files[index]))}'"


class ArrayImages(ImageSet):
    """Images in an array, or in a file that is read row by row.

    Args:
        images: (N, H, W, 3), (N, H, W, 1) or (N, H, W) uint8.
        name: what to call them.
        labels: (N,) classes, where known.

    Raises:
        UserError: the array is something else.
    """

    def __init__(
        self, images: np.ndarray | h5py.Dataset | StoredRows, name: str, labels: np.ndarray | None = None
    ) -> None:
        shape = tuple(images.shape)
        is_shape = (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))) and 0 not in shape[1:]
        if images.dtype != np.uint8 or not is_shape:
            raise UserError(
                f"'{name}' holds an array of shape {shape} and type {images.dtype} where images are expected.",
                "Store images as (N, H, W, 3) of 8-bit integers, 0 to 255.",
            )
        self.labels = None if labels is None else checked_labels(labels, name)
        if self.labels is not None and len(self.labels) != len(images):
            raise UserError(
                f"'{name}' holds {len(images)} images and {len(self.labels)} labels.", "Give one label for each image."
            )
        self.images, self.name = images, name

    def adopt(self, manifest: Mapping[str, Any] | None) -> None:
        """Take over what a manifest of these images tells; None tells nothing."""
        if manifest is None:
            return
        self.manifest, self.class_names = manifest, manifest.get("class_names")
        if not has_classes(manifest):
            self.labels = None
        elif self.labels is not None:
            checked_labels(self.labels, self.name, self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> np.ndarray:
        """One row of the array."""
        image = self._rows(index)
        image = image[..., None] if image.ndim == 2 else image
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def content_hash(self) -> str:
        """sha256 over shape and pixels; raises UserError where the machine failed."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for start in range(0, len(self.images), HASH_BLOCK):
            digest.update(np.ascontiguousarray(self._rows(slice(start, start + HASH_BLOCK))).tobytes())
        return digest.hexdigest()

    def outline(self) -> str:
        """sha256 over their shape and the pixels of a few, spread evenly."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for index in np.linspace(0, len(self) - 1, min(len(self), IMAGES_IN_OUTLINE)).astype(int).tolist():
            digest.update(np.ascontiguousarray(self._rows(index)).tobytes())
        return digest.hexdigest()

    def _rows(self, rows: int | slice) -> np.ndarray:
        try:
            return np.asarray(self.images[rows])
        except OSError as error:
            raise read_failure(self.name, error) from None


class GeneratedImages(ImageSet):
    """Images that a generator draws when they are asked for; nothing is written.

    Args:
        name: what to call them.
        labels: (N,) class of each image.
        draw: from some indices to their (B, H, W, 3) uint8 images. Image i must always come out the same.
        identity: what the images depend on: weights, seed, settings.
        class_names: name of each class, or None.
        manifest: what a sample folder would say of them.
        keep_features: whether their features may stay in the cache; a sweep's would fill it.
    """

    generated = True

    def __init__(
        self,
        name: str,
        labels: np.ndarray,
        draw: Callable[[Sequence[int]], np.ndarray],
        identity: str,
        class_names: Sequence[str] | None = None,
        manifest: Mapping[str, Any] | None = None,
        keep_features: bool = True,
    ) -> None:
        self.keep_features = keep_features
        self.name, self.draw, self.identity = printable(name), draw, identity
        self.class_names, self.manifest = class_names, manifest
        self._asked = np.asarray(labels, np.int64)
        self.labels = self._asked if has_classes(manifest or {}) else None

    def __len__(self) -> int:
        return len(self._asked)

    def load(self, index: int) -> np.ndarray:
        """Draw one image."""
        return self.draw([index])[0]

    def load_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Draw several images in one batch."""
        return list(self.draw(indices))

    def content_hash(self) -> str:
        """sha256 over the identity and the labels."""
        return hashlib.sha256(self.identity.encode() + self._asked.tobytes()).hexdigest()

    def outline(self) -> str:
        """All that they depend on."""
        return self.content_hash()


def checked_labels(labels: Any, name: str, class_names: Sequence[str] | None = None) -> np.ndarray:
    """Labels as (N,) int64.

    Args:
        labels: an array, or what a manifest has.
        name: what to call their place in an error.
        class_names: of the classes that there are, where they have names.

    Raises:
        UserError: they are no class numbers.
    """
    try:
        found = np.asarray(labels)
    except ValueError:  # lists of unequal length
        found = np.array(None)
    fault = None
    if found.ndim != 1:
        fault = f"their shape is {found.shape}"
    elif len(found) and not np.issubdtype(found.dtype, np.integer):
        fault = f"they are no integers (type {found.dtype})"
    elif (found.astype(np.int64) < 0).any():
        fault = "some are negative"
    elif class_names and len(found) and found.max() >= len(class_names):
        fault = f"{found.max()} is among them, and only {len(class_names)} classes have names"
    if fault:
        raise UserError(f"The labels in '{name}' are wrong: {fault}.", "Store the number of its class for each image.")
    return found.astype(np.int64)


def open_images(source: Path | ImageSet, image_size: Sides | None = None) -> ImageSet:
    """Open images by what the path is: a folder, an ADM `.npz` with `arr_0`, or an HDF5 file with `images`.

    Args:
        image_size: for folders: take ADM's centre crop of that size instead of each file as it is. Arrays have to have
            that size.

    Raises:
        UserError: nothing there, no images in it, not images at all, or an array of another size.
    """
    images: ImageSet
    if isinstance(source, ImageSet):
        images = source
    elif not is_there(source):
        raise UserError(f"There is nothing at '{source}'.", "Check the path.")
    elif source.is_dir():
        images = FolderImages(source, image_size)
    elif source.suffix == ".npz":
        images = _open_npz(source)
        require_size(images, image_size)
    elif source.suffix in HDF5_SUFFIXES:
        images = _open_hdf5(source)
        require_size(images, image_size)
    else:
        raise UserError(f"'{source}' is neither a folder nor an .npz or .h5 file.", "Give a folder of images.")
    if len(images) == 0:
        raise UserError(f"'{images.name}' holds no image.", "Give the folder or file that holds the images.")
    return images


def require_size(images: ArrayImages, image_size: Sides | None) -> None:
    """Raise a UserError unless an array's images have the size that is asked for; they are never cropped."""
    size = tuple(images.images.shape[1:3])
    if image_size is not None and size != height_and_width(image_size):
        raise UserError(
            f"The images in '{images.name}' have {sides_text(size)} pixels, and --image-size {sides_text(image_size)} "
            "crops files alone.",
            "Give a folder of images, or leave --image-size out.",
        )


def decode_opaque(path: Path) -> np.ndarray:
    """One file as (H, W, 3) uint8, exactly as stored: no crop, no turn, no background put behind it.

    Raises:
        BadImageError: unreadable, no regular file, more than 8 bits a channel, or pixels that are not opaque.
        UserError: the machine failed (`read_failure`).
    """
    try:
        with open_regular(path) as file, Image.open(file) as image:
            image.load()
            if image.mode.startswith(("I", "F")) or _bits_of_channel(file, image) > 8:
                raise ValueError("it has more than 8 bits a channel; convert it to 8-bit RGB")
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            if has_alpha and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
                raise ValueError("it has transparent pixels; flatten it onto a background of your choice")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise read_failure(str(path), error) from None


def _hash_of_file(path: Path) -> bytes:
    """sha256 of the bytes; of none where the file cannot be read, and is a bad image."""
    try:
        with open_regular(path) as file:
            return hashlib.sha256(file.read()).digest()
    except (OSError, MemoryError) as error:
        failure = read_failure(str(path), error)
        if not isinstance(failure, BadImageError):
            raise failure from None
        return hashlib.sha256().digest()


def _bits_of_channel(file: BinaryIO, image: Image.Image) -> int:
    """As the file has them: Pillow cuts deep colours down to 8 bits in silence. 8 for formats that have no more."""
    file.seek(0)
    if image.format == "PNG":
        return file.read(25)[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))  # type: ignore[attr-defined]
    if image.format == "PPM":
        numbers = re.sub(rb"#[^\r\n]*", b"", file.read(1 << 16)).split(maxsplit=4)
        return int(numbers[3]).bit_length() if numbers[0] in (b"P2", b"P3", b"P5", b"P6") else 1
    return 8


def _open_npz(path: Path) -> ArrayImages:
    arrays = read_npz(path)
    if IMAGES not in arrays:
        kind = "It holds statistics: give it as --reference." if "mu" in arrays else "Give an ADM sample batch."
        raise UserError(f"'{path}' holds no images (no array 'arr_0').", kind)
    images = ArrayImages(arrays[IMAGES], printable(str(path)), arrays.get("arr_1"))
    images.adopt(manifest_of_npz(path, arrays))
    return images


def _open_hdf5(path: Path) -> ArrayImages:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read as an HDF5 file ({error}).", "Make it again.") from None
    if not isinstance(file.get("images"), h5py.Dataset):
        raise UserError(
            f"'{path}' holds no dataset 'images' (it has: {', '.join(file)}).",
            "A latent cache holds no images: give the folder that it was made from.",
        )
    labels = file.get("labels")
    if labels is not None and not isinstance(labels, h5py.Dataset):
        raise UserError(f"'labels' of '{path}' is no dataset.", "Store the number of its class for each image.")
    images = ArrayImages(file["images"], printable(str(path)), None if labels is None else labels[()])
    images.adopt(manifest_of_hdf5(path, file))
    return images
