"""Image folders inside a `.tar` or `.zip`, read in place: nothing is unpacked.

Also ImageNet as it is distributed, a tar of one tar per class. Which names are classes and images, and the
decoding, are images.py's.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xar_cli.config.schema import Sides
from xar_cli.data.images import (
    BadImageError,
    decode_image,
    is_hidden,
    is_image_name,
    read_failure,
    sort_into_classes,
)
from xar_cli.errors import UserError

ARCHIVE_SUFFIXES = (".tar", ".zip")
MAX_FILE_BYTES = 1 << 30  # a compressed member that unpacks to more is a bomb, not an image


def is_archive(path: Path) -> bool:
    """Whether a path is a file that this module reads, or one that it explains why not (.tar.gz)."""
    return path.is_file() and (path.suffix.lower() in ARCHIVE_SUFFIXES or ".tar" in path.suffixes)


def open_archive(path: Path) -> ArchiveImages:
    """The images in a `.tar` or `.zip`.

    Raises:
        UserError: a compressed tar, a damaged or encrypted archive, or one without images.
    """
    return ZipImages(path) if path.suffix.lower() == ".zip" else TarImages(path)


class ArchiveImages:
    """Images in an archive (an `ImageSource`): classes and order as in the folder that was packed.

    Folders that wrap the class folders (`imagenet/train/n01440764/...`) are passed over.
    """

    def __init__(self, path: Path, members: list[str]) -> None:
        self.path = path
        kept = [name for name in members if not any(is_hidden(part) for part in name.split("/"))]
        prefix = _wrapping([name for name in kept if is_image_name(name)])
        inside = [name[len(prefix) :] for name in kept if name.startswith(prefix) and is_image_name(name)]
        self.class_names, self.names, self.labels = sort_into_classes(inside, str(path))
        self._prefix = prefix

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def load(self, index: int, image_size: Sides, image_channels: int) -> np.ndarray:
        """Image `index`, cropped: uint8 (image_channels, height, width), or BadImageError."""
        name = self._prefix + self.names[index]
        shown = f"{self.path}:{name}"
        return decode_image(self._read(name, shown), shown, image_size, image_channels)

    def _read(self, name: str, shown: str) -> bytes:
        """The bytes of a member; `shown` is what an error calls it."""
        raise NotImplementedError


class TarImages(ArchiveImages):
    """Images in an uncompressed tar, read by offset from any thread."""

    def __init__(self, path: Path) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                self._places = {_plain(name): place for name, *place in _members(tar)}
        except tarfile.TarError as error:
            raise UserError(
                f"'{path}' cannot be read as an uncompressed tar: {error}.",
                "A compressed tar has no way to its middle: unpack it, or pack it again without compression.",
            ) from None
        super().__init__(path, list(self._places))
        self._descriptor = os.open(path, os.O_RDONLY)

    def _read(self, name: str, shown: str) -> bytes:
        offset, size = self._places[name]
        try:
            data = os.pread(self._descriptor, size, offset) if size <= MAX_FILE_BYTES else b""
        except (OSError, MemoryError) as error:
            raise read_failure(shown, error) from None
        if len(data) != size:
            raise BadImageError(shown, "the archive ends before it does")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class ZipImages(ArchiveImages):
    """Images in a zip, stored or compressed."""

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"'{path}' cannot be read as a zip: {error}.", "Copy or pack it again.") from None
        self._members = {_plain(member.filename): member for member in self._zip.infolist() if not member.is_dir()}
        if any(member.flag_bits & 1 for member in self._members.values()):
            raise UserError(f"'{path}' is encrypted.", "Unpack it with its password first.")
        super().__init__(path, list(self._members))

    def _read(self, name: str, shown: str) -> bytes:
        member = self._members[name]
        if member.file_size > MAX_FILE_BYTES:
            raise BadImageError(shown, f"{member.file_size} bytes are more than any photograph has")
        try:
            return self._zip.read(member)
        except Exception as error:  # damaged members make the decompressors raise nearly anything
            raise read_failure(shown, error) from None


def _members(tar: tarfile.TarFile, base: int = 0, folder: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, place of the first byte, and size of every file; a tar inside counts as a folder of its name."""
    for member in tar:
        if not member.isfile():
            continue
        name, place = folder + member.name, base + member.offset_data
        if name.endswith(".tar") and not folder:
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                yield from _members(inner, place, f"{name.removesuffix('.tar')}/")
        else:
            yield name, place, member.size


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _wrapping(names: list[str]) -> str:
    """The folders around the class folders: what all names begin with, as long as class and file remain."""
    prefix = ""
    while names:
        first = names[0][len(prefix) :].partition("/")[0] + "/"
        longer = prefix + first
        if not all(name.startswith(longer) and name.count("/", len(longer)) for name in names):
            break
        prefix = longer
    return prefix
