"""Image folders inside a `.tar` or `.zip`, read in place: nothing is unpacked.

Also ImageNet as it is distributed, a tar of one tar per class. Which names are classes and images, and the
decoding, are images.py's.
"""

from __future__ import annotations

import os
import posixpath
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
    printable,
    read_failure,
    sort_into_classes,
)
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import is_file

ARCHIVE_SUFFIXES = (".tar", ".zip")
COMPRESSED_TARS = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")  # besides .tar.gz and its kin
MAX_LINKS = 40  # that a path may lead through, as on Linux
MAX_FILE_BYTES = 1 << 30  # a compressed member that unpacks to more is a bomb, not an image


def is_archive(path: Path) -> bool:
    """Whether a path is a file that this module reads, or one that it explains why not (.tar.gz)."""
    known = path.suffix.lower() in (*ARCHIVE_SUFFIXES, *COMPRESSED_TARS) or ".tar" in path.suffixes
    return known and is_file(path)


def open_archive(path: Path) -> ArchiveImages:
    """The images in a `.tar` or `.zip`.

    Raises:
        UserError: a compressed tar, a damaged or encrypted archive, images that are links to somewhere else, a class
            without images, or no images at all.
    """
    return ZipImages(path) if path.suffix.lower() == ".zip" else TarImages(path)


class ArchiveImages:
    """Images in an archive (an `ImageSource`): classes and order as in the folder that was packed.

    Folders that wrap the class folders (`imagenet/train/n01440764/...`) are passed over.

    Args:
        path: the archive.
        members: names of the files in it, and of folders, these with a slash at the end.
    """

    def __init__(self, path: Path, members: list[str]) -> None:
        self.path = path
        kept = [name for name in members if name != "/" and not _is_hidden_path(name)]
        prefix = _wrapping([name for name in kept if is_image_name(name)])
        inside = [name[len(prefix) :] for name in kept if name.startswith(prefix)]
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
                contents = _TarContents()
                contents.add(tar)
        except tarfile.TarError as error:
            raise UserError(
                f"'{path}' cannot be read as an uncompressed tar: {error}.",
                "A compressed tar has no way to its middle: unpack it, or pack it again without compression.",
            ) from None
        self._places = contents.files
        lost = contents.follow_links()
        images = [name for name in lost if is_image_name(name)]
        if images:
            raise UserError(
                f"{len(images)} links of '{path}' lead to no file in it, '{printable(images[0])}' for one.",
                "Pack it again with the files that they lead to: tar --dereference.",
            )
        if lost:
            log.warning(
                f"{len(lost)} links of '{printable(str(path))}' lead to nothing in it and are left out, files or whole "
                f"classes: {printable(', '.join(lost[:10]))}{', ...' if len(lost) > 10 else ''}"
            )
        super().__init__(path, [*self._places, *lost, *contents.folders])  # lost ones as files: their class is seen
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
        members = self._zip.infolist()
        self._members = {_plain(member.filename): member for member in members if not member.is_dir()}
        if any(member.flag_bits & 1 for member in self._members.values()):
            raise UserError(f"'{path}' is encrypted.", "Unpack it with its password first.")
        folders = [f"{_plain(member.filename)}/" for member in members if member.is_dir()]
        super().__init__(path, [*self._members, *folders])

    def _read(self, name: str, shown: str) -> bytes:
        member = self._members[name]
        if member.file_size > MAX_FILE_BYTES:
            raise BadImageError(shown, f"{member.file_size} bytes are more than any photograph has")
        try:
            return self._zip.read(member)
        except Exception as error:  # damaged members make the decompressors raise nearly anything
            raise read_failure(shown, error) from None


class _TarContents:
    """What is in a tar; a tar inside it counts as a folder of its name.

    Attributes:
        files: place of the first byte and size of every file.
        links: where the hard and symbolic links lead, as a name in the archive; what lies outside begins with / or ..
        folders: names of the folders, with a slash at the end.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int]] = {}
        self.links: dict[str, str] = {}
        self.folders: list[str] = []

    def add(self, tar: tarfile.TarFile, base: int = 0, folder: str = "") -> None:
        """Take in the members of a tar that begins at byte `base`."""
        for member in tar:
            name, place = folder + _plain(member.name), base + member.offset_data
            if _is_hidden_path(name):
                continue
            if member.isdir():
                self.folders.append(f"{name}/")
            elif member.islnk():
                self.links[name] = folder + _plain(member.linkname)
            elif member.issym():
                self.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.isfile() and name.endswith(".tar") and not folder:
                inside = f"{name.removesuffix('.tar')}/"
                self.folders.append(inside)
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    self.add(inner, place, inside)
            elif member.isfile():
                self.files[name] = (place, member.size)

    def follow_links(self) -> list[str]:
        """Give each link the place of the file that it leads to, or all files of the folder; the names of those that
        lead to nothing here.

        Raises:
            UserError: a link leads back to a folder above it.
        """
        lost, tree = [], self._tree() if self.links else {}
        for name in self.links:
            end = self._end(name)
            if end in tree:
                self.folders.append(f"{name}/")
                self.files.update({f"{name}/{inner}": place for inner, place in self._files_below(tree, end)})
            elif end in self.files:
                self.files[name] = self.files[end]
            else:
                lost.append(name)
        return lost

    def _end(self, name: str) -> str:
        """Where a path leads to, one link after the other, of its folders too; some link of it if it never ends."""
        for _ in range(MAX_LINKS):
            parts = name.split("/")
            heads = ("/".join(parts[: i + 1]) for i in range(len(parts)))
            link = next((head for head in heads if head in self.links), None)
            if link is None:
                break
            name = posixpath.normpath(self.links[link] + name[len(link) :])
        return name

    def _tree(self) -> dict[str, set[str]]:
        """The names in every folder; "." is the outermost."""
        folders = [name.rstrip("/") for name in self.folders]
        tree: dict[str, set[str]] = {name: set() for name in folders}
        for name in (*self.files, *self.links, *folders):
            while name:
                folder, _, last = name.rpartition("/")
                tree.setdefault(folder or ".", set()).add(last)
                name = folder
        return tree

    def _files_below(
        self, tree: dict[str, set[str]], folder: str, above: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, tuple[int, int]]]:
        """The files of a folder, links in it followed: name inside it and place."""
        if folder in above:
            raise UserError(
                f"A link in '{printable(folder)}' leads back to a folder above it.", "Remove the link: it never ends."
            )
        for name in tree[folder]:
            end = self._end(posixpath.normpath(f"{folder}/{name}"))
            if end in tree:
                for inner, place in self._files_below(tree, end, (*above, folder)):
                    yield f"{name}/{inner}", place
            elif end in self.files:
                yield name, self.files[end]


def _is_hidden_path(name: str) -> bool:
    return any(is_hidden(part) for part in name.split("/"))


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
