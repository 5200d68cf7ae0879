"""The manifest that `xar sample` writes with its images, as evaluation reads it; None for what is another program's.

Owns where it lies in each kind of set, and the form of the entries that are read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from xar_cli.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "xar-samples"
ATTRIBUTE = "manifest"  # of an HDF5 file


def manifest_of_folder(root: Path) -> Mapping[str, Any] | None:
    """The manifest of samples in a folder.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}).", "Sample again, or remove that file.") from None
    return _checked_manifest(manifest, path)


def manifest_of_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any] | None:
    """The manifest of samples that `xar sample` packed: it lies beside the file, and its labels are the file's.

    Raises:
        UserError: the manifest is damaged, or cannot be read.
    """
    labels, beside = arrays.get("arr_1"), path.parent / MANIFEST
    if labels is None or labels.ndim != 1 or not beside.is_file():
        return None
    try:
        manifest = _checked_manifest(json.loads(_read(beside)), beside)
    except ValueError:  # another program's file
        return None
    if manifest is None:
        return None
    return manifest if labels.tolist() == (manifest.get("labels") or [])[: len(labels)] else None


def manifest_of_hdf5(path: Path, file: h5py.File) -> Mapping[str, Any] | None:
    """The manifest of samples that `xar sample` packed: an attribute of the file.

    Raises:
        UserError: it is damaged.
    """
    try:
        manifest = json.loads(file.attrs.get(ATTRIBUTE, "null"))
    except (ValueError, TypeError):  # another program's attribute
        return None
    return _checked_manifest(manifest, path)


def has_classes(manifest: Mapping[str, Any]) -> bool:
    """Whether the labels of samples mean something: those of a model without classes are all 0."""
    return ((manifest.get("config") or {}).get("data") or {}).get("num_classes") != 0


def is_size(value: Any) -> bool:
    """Whether a value of a JSON file is the side of an image, or height and width."""
    sides = value if isinstance(value, list) else [value, value]
    return len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)


def _checked_manifest(manifest: Any, path: Path) -> Mapping[str, Any] | None:
    """A manifest of samples whose entries have the form that is read here; None for what is another program's."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    for key, kind in {"labels": list, "class_names": list, "config": dict, "evaluations": dict}.items():
        if not isinstance(manifest.get(key), kind | None):
            raise UserError(f"'{path}' is damaged: '{key}' is no {kind.__name__}.", "Sample again into a new folder.")
    data, size = (manifest.get("config") or {}).get("data"), manifest.get("image_size")
    if not isinstance(data, dict | None) or not (size is None or is_size(size)):
        wrong = "image_size" if isinstance(data, dict | None) else "config"
        raise UserError(f"'{path}' is damaged: '{wrong}' is not as it was written.", "Sample again into a new folder.")
    return manifest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.", "Mend its permissions or disk.") from None
