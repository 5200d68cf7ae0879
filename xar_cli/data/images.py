"""From a folder of images to pixels: which files there are, of which class, and the ADM centre crop.

The one place where an image file becomes numbers; caching and evaluation both come here. Archives of such
folders are read by archives.py, which shares the decoding.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image

from xar_cli.config.schema import Sides, height_and_width
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import is_there

CROP_RULE = "adm-centre"  # name of the rule in `centre_crop`, written into every cache
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
MAX_PIXELS = 178_956_970  # decoded or resized; where Pillow too calls an image a decompression bomb
_FAULTS_OF_A_FILE = frozenset(
    (
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,  # a damaged file sends its decoder to a place before its first byte
    )
)
_TURNS = {  # of EXIF's orientations; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# Set once, since warning filters are shared by all threads: the checks below decide what is too large.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BadImageError(UserError):
    """One image that cannot be used; its text names the file and says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"Cannot read the image '{printable(name)}': {reason}.", "Mend or remove the file.")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # type: ignore[override]
        return type(self), (self.name, self.reason)


def read_failure(name: str, error: Exception) -> UserError:
    """What a failure to read a file means: a BadImageError; or a UserError that ends the work (exit code 1), where
    the disk, the network or the memory failed, which says nothing of the file.
    """
    number = error.errno if isinstance(error, OSError) else None  # Pillow's own OSErrors have none
    if isinstance(error, MemoryError) or (number is not None and number not in _FAULTS_OF_A_FILE):
        return UserError(
            f"Reading '{printable(name)}' failed: {_reason(error)}.",
            "That is the machine, not the file: mend it, and give the same command again.",
            exit_code=1,
        )
    return BadImageError(name, _reason(error))


class ImageSource(Protocol):
    """Labelled images in a fixed order: what the cache stage reads. A folder or an archive of one.

    Attributes:
        class_names: the classes in order of label; empty for images without classes.
        names: path of every image inside the source, with forward slashes, sorted within its class.
        labels: class of every image, int64 (N,); 0 throughout without classes.
    """

    class_names: tuple[str, ...]
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        ...

    def load(self, index: int, image_size: Sides, image_channels: int) -> np.ndarray:
        """Image `index`, cropped: uint8 (image_channels, height, width), or BadImageError."""
        ...


class ImageFolder:
    """The images under a folder: one class per subfolder, sorted by name; files sorted, nested to any depth.

    Images right in the folder count only where no subfolder holds images: then there are no classes. Links to
    folders are followed. Hidden files and folders are left out.

    Attributes as in `ImageSource`.

    Raises:
        UserError: no such folder, no images in it, a class without images, a folder that cannot be read, or a
            link that leads back to a folder above it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.class_names, self.names, self.labels = list_classes(self.root)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def load(self, index: int, image_size: Sides, image_channels: int) -> np.ndarray:
        """Image `index`, cropped: uint8 (image_channels, height, width)."""
        return load_image(os.path.join(self.root, self.names[index]), image_size, image_channels)


def list_classes(
    root: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES, what: str = "images"
) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Class names, file names in order, and labels of the files with some suffix below a folder.

    Raises:
        UserError: as `ImageFolder`.
    """
    if not is_there(root) or not root.is_dir():
        raise UserError(f"There is no folder '{printable(str(root))}'.", "Check the path.")
    return sort_into_classes(list(walk(root)), str(root), suffixes, what)


def sort_into_classes(
    names: list[str], source: str, suffixes: frozenset[str] = IMAGE_SUFFIXES, what: str = "images"
) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Class names, file names in order, and labels, from the relative paths of all files and empty folders.

    Args:
        names: paths with forward slashes; one that ends in a slash is a folder with nothing in it.
        source: what to call the whole in an error.
        suffixes: of the files that count.
        what: what to call those files in an error.
    """
    found: dict[str, list[str]] = {}
    others: set[str] = set()
    for name in names:
        first, slash, _ = name.partition("/")
        if os.path.splitext(name)[1].lower() in suffixes:
            found.setdefault(first if slash else "", []).append(name)
        elif slash:
            others.add(first)
    empty = sorted(others - found.keys())
    unsorted = found.pop("", [])
    if not found and not unsorted:
        raise UserError(
            f"There are no {what} in '{printable(source)}'.",
            f"Give a folder with one subfolder of {what} per class.",
        )
    if not found:
        return (), sorted(unsorted), np.zeros(len(unsorted), np.int64)
    if unsorted:
        log.warning(f"{len(unsorted)} {what} lie beside the class folders of '{printable(source)}' and are left out")
    if empty:
        listed = ", ".join(f"'{printable(name)}'" for name in empty[:5])
        raise UserError(
            f"{len(empty)} class folders of '{printable(source)}' hold no {what}: {listed}.",
            "Fill or remove them, so that the classes are what you mean.",
        )
    class_names = tuple(sorted(found))
    ordered = [name for class_name in class_names for name in sorted(found[class_name])]
    counts = [len(found[class_name]) for class_name in class_names]
    return class_names, ordered, np.repeat(np.arange(len(class_names), dtype=np.int64), counts)


def is_image_name(name: str) -> bool:
    """Whether a file name ends as an image's does."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is one that no data set means: hidden, or macOS archive rubble."""
    return name.startswith(".") or name == "__MACOSX"


def printable(name: str) -> str:
    """A file name as text that any terminal or JSON file takes: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def load_image(path: str | Path, image_size: Sides, image_channels: int = 3) -> np.ndarray:
    """Read an image file as the model sees it.

    Args:
        path: the file.
        image_size: of the crop: one side, or (height, width), in pixels.
        image_channels: 1 or 3.

    Returns:
        uint8 (image_channels, height, width), 0 to 255; RGB, or grey for image_channels = 1.

    Raises:
        BadImageError: missing, unreadable, truncated, not an image, or too large to be one.
        UserError: the machine failed (`read_failure`).
    """
    try:
        with open_regular(path) as file:
            return decode_image(file, str(path), image_size, image_channels)
    except (OSError, MemoryError) as error:
        raise read_failure(str(path), error) from None


def open_regular(path: str | Path) -> BinaryIO:
    """A file, opened to be read; an OSError for a pipe or a device, at which reading could wait for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder fails at once
        raise OSError(errno.EINVAL, "it is no regular file")
    return open(path, "rb")


def decode_image(file: BinaryIO | bytes, name: str, image_size: Sides, image_channels: int = 3) -> np.ndarray:
    """The same as `load_image`, from an open file or its bytes; `name` is for the error."""
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(stream) as image:
            _refuse_bomb(image.size)
            pixels = np.asarray(centre_crop(_to_eight_bits(image, image_channels), image_size))
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise read_failure(name, error) from None
    return pixels[None] if image_channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def centre_crop(image: Image.Image, size: Sides) -> Image.Image:
    """ADM's centre crop, to a rectangle as to a square: halve with a box filter while both sides are at
    least twice the target's, then bicubic until the image just covers the target, then cut the centre out.
    Images that are smaller on a side are enlarged by the bicubic step.

    Args:
        image: of any size.
        size: side of the square, or (height, width), in pixels.
    """  # fmt: skip
    height, width = height_and_width(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = round(image.width * scale), round(image.height * scale)
    _refuse_bomb(covering)
    image = _resize(image, *covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Rows first, then columns: the order of every Pillow that ADM and MAR ran on.

    Pillow rounds between the two passes, and newer versions take them the other way round for tall images.
    """
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def _to_eight_bits(image: Image.Image, image_channels: int) -> Image.Image:
    """The image upright, in mode RGB or L. Transparency is dropped, as ADM drops it; of 16 bits the upper 8
    are kept.
    """
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image)
        image = Image.fromarray((np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image.convert("L" if image_channels == 1 else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data says. Pillow's exif_transpose also writes those data anew, and fails at any odd
    entry of a sound photograph.
    """
    image.load()  # TIFF files are turned by this
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _refuse_bomb(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than any photograph has")


def _reason(error: Exception) -> str:
    """Why a file failed, without the object addresses that Pillow puts into its messages."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "the memory does not suffice"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image, or it is damaged from its first bytes on"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")


def walk(root: Path) -> Iterator[str]:
    """Paths of all files below `root` that are not hidden, and of folders that hold nothing, these with a slash at the
    end. Links to folders are followed.

    Raises:
        UserError: a folder that cannot be read, or a link that leads back to a folder above it.
    """
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        relative, above = pending.pop()
        folder = os.path.join(root, relative)
        try:
            status = os.stat(folder)
            entries = [(entry.name, entry.is_dir()) for entry in os.scandir(folder) if not is_hidden(entry.name)]
        except OSError as error:
            raise UserError(
                f"Cannot read the folder '{printable(error.filename or folder)}': {error.strerror}.",
                "Fix its permissions or remove it.",
            ) from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise UserError(
                f"The link '{printable(folder)}' leads back to a folder above it.",
                "Remove the link: it never ends.",
            )
        if relative and not entries:
            yield f"{relative}/"
        for entry, is_folder in entries:
            name = f"{relative}/{entry}" if relative else entry
            if is_folder:
                pending.append((name, (*above, identity)))
            else:
                yield name
