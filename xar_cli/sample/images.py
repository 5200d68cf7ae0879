"""Generated images on disk: one PNG per index, written whole by threads and read back with care, and a grid of them."""

from __future__ import annotations

import io
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from xar_cli.errors import UserError

PNG_END = b"IEND\xaeB`\x82"  # the last eight bytes of every whole PNG file
MIN_GRID_SIDE = 64  # smaller images are enlarged in a grid, by a whole factor
TEMPORARY = re.compile(
    r"(?:\d{6,}|\.samples\.npz|\.samples\.h5|\.manifest\.json)\.(\d+)\.tmp"
)  # the number: its process


def image_path(folder: Path, index: int) -> Path:
    """The file of image `index`."""
    return folder / f"{index:06d}.png"


def is_whole(path: Path) -> bool:
    """Whether a PNG file is there to its last byte; what lies before it is not read, so 50,000 files take a moment."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def to_pil(image: np.ndarray) -> Image.Image:
    """(channels, H, W) uint8, 1 or 3 channels, as a Pillow image."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))


def load_images(folder: Path, indices: Iterable[int], size: tuple[int, int] | None = None) -> Iterator[Image.Image]:
    """The images of a folder in the order of `indices`, decoded to the end.

    Args:
        folder: where they lie.
        indices: which ones; all of them exist.
        size: width and height that they must have; None takes any.

    Raises:
        UserError: some are damaged (exit code 1). All damaged ones from there on are named and removed, so that the
            same command makes them again.
        OSError: a file cannot be read at all.
    """
    todo = list(indices)
    for place, index in enumerate(todo):
        image = _load(image_path(folder, index), size)
        if image is None:
            paths = [image_path(folder, other) for other in todo[place:]]
            raise _removed(folder, [path for path in paths if _load(path, size) is None])
        yield image


def _load(path: Path, size: tuple[int, int] | None) -> Image.Image | None:
    """The image of a file, or None where its content is damaged or of another size."""
    data = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(data))
        image.load()  # to the checksum of the pixels
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damage
        return None
    return image if size in (None, image.size) else None


def _removed(folder: Path, damaged: list[Path]) -> UserError:
    """Remove damaged images; the error that tells of it."""
    for path in damaged:
        path.unlink()
    named = ", ".join(path.name for path in damaged[:10]) + (", ..." if len(damaged) > 10 else "")
    return UserError(
        f"Damaged images in '{folder}' have been removed: {named}.", "The same command makes them again.", exit_code=1
    )


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left half-written; to be called before this job writes its first file.

    A file whose process is alive on this machine stays: another job may be at work on the same folder.
    """
    for path in folder.iterdir():
        found = TEMPORARY.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if process == os.getpid() or os.name != "posix":  # elsewhere asking would end it
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class PngWriter:
    """Encodes and writes PNG files in threads while the next images are being drawn.

    Args:
        folder: where the files go.
        threads: encoders at work.
        backlog: images that may wait; `write` blocks beyond that, so memory stays flat.
    """

    def __init__(self, folder: Path, threads: int = 2, backlog: int = 1024) -> None:
        self._folder, self._backlog = folder, backlog
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="png")
        self._pending: deque[Future[None]] = deque()

    def write(self, index: int, image: np.ndarray) -> None:
        """Queue image `index`, (channels, H, W) uint8; raises OSError if an earlier one could not be written."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._backlog):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._save, index, image))

    def close(self) -> None:
        """Wait for all files; raises OSError if one could not be written."""
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _save(self, index: int, image: np.ndarray) -> None:
        path = image_path(self._folder, index)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            to_pil(image).save(temporary, format="PNG", compress_level=1)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def grid_image(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size side by side, row after row, on white."""
    width, height = images[0].size
    factor = max(1, -(-MIN_GRID_SIDE // max(width, height)))
    width, height = width * factor, height * factor
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        tile = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return grid
