"""The UCI handwritten digits: 1,797 real 8 x 8 scans, shipped inside the package, and their one fixed split.

Owns the table, the split and the image folders written from it. The data is shipped, not taken from
scikit-learn: 46 KB of table do not justify that dependency, and the quickstart needs no network. Source and
licence (CC BY 4.0): uci_digits.LICENSE.txt, beside the data.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import require_writable

NUM_CLASSES = 10
NUM_TRAIN = 1500
SPLIT_SEED = 0
MAX_VALUE = 16  # a scan counts the ink of 4 x 4 finer pixels
FOLDER_BYTES = 16_000_000  # disk for both folders, one small file an image


@dataclass(frozen=True)
class Digits:
    """Scanned digits.

    Attributes:
        images: (N, 8, 8) uint8, 0 (paper) to 255 (ink).
        labels: (N,) int64, 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


def load_digits() -> Digits:
    """All 1,797 scans in their original order; values 0 to 16 become round(value * 255 / 16)."""
    with (resources.files("xar_cli.data") / "uci_digits.npz").open("rb") as file, np.load(file) as table:
        values, labels = table["images"], table["labels"]
    images = np.rint(values.astype(np.float64) * 255 / MAX_VALUE).astype(np.uint8)
    return Digits(images, labels.astype(np.int64))


def split_digits() -> tuple[Digits, Digits]:
    """The fixed split: 1,500 train and 297 held-out scans, each class shared out in the same proportion."""
    digits = load_digits()
    train, heldout = split_indices(digits.labels)
    return Digits(digits.images[train], digits.labels[train]), Digits(digits.images[heldout], digits.labels[heldout])


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (1500,) and (297,) of the train and held-out scans, for the labels in their original order.

    RandomState is used because NumPy promises its stream for ever, so that the split is the same everywhere.
    """
    rng = np.random.RandomState(SPLIT_SEED)
    by_class = [rng.permutation(np.flatnonzero(labels == label)) for label in range(NUM_CLASSES)]
    share = np.array([len(indices) for indices in by_class]) * NUM_TRAIN / len(labels)
    quota = np.floor(share).astype(int)
    largest_remainders = np.argsort(quota - share, kind="stable")[: NUM_TRAIN - quota.sum()]
    quota[largest_remainders] += 1
    train = np.concatenate([indices[:count] for indices, count in zip(by_class, quota, strict=True)])
    heldout = np.concatenate([indices[count:] for indices, count in zip(by_class, quota, strict=True)])
    return rng.permutation(train), rng.permutation(heldout)


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write the split as image folders `train/<digit>/0000.png` and `heldout/<digit>/0000.png`, 8 x 8 grey.

    A folder that is already there whole is kept and said so. A folder appears only when all of it is written.

    Returns:
        The train folder and the held-out folder.

    Raises:
        UserError: the place cannot be written, or a folder of that name holds something else.
    """
    folders = []
    for name, digits in zip(("train", "heldout"), split_digits(), strict=True):
        target = folder / name
        if target.exists():
            _require_whole(target, len(digits.labels))
            log.info(f"{target}: {len(digits.labels)} digits are there already")
        else:
            require_writable(folder, FOLDER_BYTES, "the digits")
            _write(target, digits)
            log.info(f"{target}: wrote {len(digits.labels)} digits")
        folders.append(target)
    return folders[0], folders[1]


def _write(target: Path, digits: Digits) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for label in range(NUM_CLASSES):
        (partial / str(label)).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        Image.fromarray(image).save(partial / str(label) / f"{index:04d}.png")
    partial.rename(target)


def _require_whole(target: Path, expected: int) -> None:
    found = sum(1 for _ in target.glob("*/*.png"))
    if found != expected:
        raise UserError(
            f"'{target}' holds {found} images in class folders where the digits have {expected}.",
            "Move that folder away, or choose another place for the digits.",
        )
