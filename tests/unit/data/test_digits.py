"""The shipped digits: values, split, folders."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from xar_cli.data.digits import load_digits, split_digits, split_indices, write_digits
from xar_cli.errors import UserError

SPLIT_DIGEST = "e4058dda0a07e6da"


def test_table_is_the_uci_test_part() -> None:
    digits = load_digits()
    assert digits.images.shape == (1797, 8, 8)
    assert digits.images.dtype == np.uint8
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The first scan is a zero; these are its top rows in the published file.
    values = np.rint(digits.images[0, :2].astype(float) * 16 / 255).astype(int)
    assert values.tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert digits.labels[0] == 0


def test_table_equals_scikit_learn() -> None:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn is not installed: no second copy to compare"
    )
    theirs, ours = datasets.load_digits(), load_digits()
    assert np.array_equal(np.rint(theirs.images * 255 / 16).astype(np.uint8), ours.images)
    assert np.array_equal(theirs.target, ours.labels)


def test_values_use_the_whole_range_and_round() -> None:
    assert np.unique(load_digits().images).tolist() == [round(v * 255 / 16) for v in range(17)]


def test_split_is_fixed_disjoint_and_stratified() -> None:
    labels = load_digits().labels
    train, heldout = split_indices(labels)
    assert (len(train), len(heldout)) == (1500, 297)
    assert sorted([*train, *heldout]) == list(range(1797))
    share = np.bincount(labels[train]) / np.bincount(labels)
    assert np.abs(share - 1500 / 1797).max() < 1 / 174  # each class within one image of its share
    digest = hashlib.sha256(np.concatenate([train, heldout]).astype("<i8").tobytes()).hexdigest()
    assert digest.startswith(SPLIT_DIGEST)


def test_folders_hold_the_scans(tmp_path) -> None:
    train_folder, heldout_folder = write_digits(tmp_path)
    assert [folder.name for folder in (train_folder, heldout_folder)] == ["train", "heldout"]
    _, heldout = split_digits()
    for index in (0, 150, 296):
        with Image.open(heldout_folder / str(heldout.labels[index]) / f"{index:04d}.png") as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), heldout.images[index])
    assert len(list(train_folder.glob("*/*.png"))) == 1500
    assert sorted(path.name for path in train_folder.iterdir()) == [str(label) for label in range(10)]


def test_second_call_rewrites_nothing(tmp_path, caplog) -> None:
    write_digits(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.set_level("INFO", logger="xar")
    write_digits(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path) -> None:
    (tmp_path / "train" / "0").mkdir(parents=True)
    (tmp_path / "train" / "0" / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds 1 images"):
        write_digits(tmp_path)
    assert (tmp_path / "train" / "0" / "mine.png").read_bytes() == b"mine"
