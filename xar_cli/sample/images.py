"""Generated images on disk: one PNG per index, written whole by background threads, and a grid to look at."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

PNG_END = b"IEND\xaeB`\x82"  # the last eight bytes of every whole PNG file
MIN_GRID_SIDE = 64  # smaller images are enlarged in a grid, by a whole factor


def image_path(folder: Path, index: int) -> Path:
    """The file of image `index`."""
    return folder / f"{index:06d}.png"


def is_whole(path: Path) -> bool:
    """Whether a PNG file is there to its last byte."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def to_pil(image: np.ndarray) -> Image.Image:
    """(channels, H, W) uint8, 1 or 3 channels, as a Pillow image."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))


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
