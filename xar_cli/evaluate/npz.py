"""Arrays in .npz files, read without unpickling anything; a large one stays on the disk.

ADM's batches of 50,000 images take 10 GB, and every process of a machine opens them.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from xar_cli.errors import UserError
from xar_cli.run_dir import read_at

IMAGES = "arr_0"  # the array that stays on the disk, by ADM's name
LOCAL_HEADER = struct.Struct("<26xHH")  # of a member of a zip file: the lengths of its name and of its extra field
BLOCK = 1 << 24


class StoredRows:
    """An array that lies in a file as plain bytes, of which rows are read when they are asked for.

    Like an array it has `shape`, `dtype` and a length, and takes a row's number or a slice of rows. Threads may share
    it.

    Args:
        path: the file.
        offset: where its first row begins.
        shape, dtype: of the whole array, in C order.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self._file, self._offset = path.open("rb", buffering=0), offset
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        """Rows as they are in the file; raises OSError where it has become shorter."""
        if not isinstance(rows, slice):
            return self[rows : rows + 1][0]
        start, stop, _ = rows.indices(len(self))
        count = max(stop - start, 0)
        data = read_at(self._file.fileno(), count * self._row_bytes, self._offset + start * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


def read_npz(path: Path) -> dict[str, Any]:
    """All arrays of an .npz file by name; `arr_0` is `StoredRows` where it is not compressed.

    Raises:
        UserError: it is damaged, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = _stored_rows(path, arrays.zip)
            left = {IMAGES: stored} if stored is not None else {}
            return {name: arrays[name] for name in arrays.files if name not in left} | left
    except Exception as error:  # zipfile, zlib, numpy: each has errors of its own
        raise UserError(f"'{path}' cannot be read as an .npz file ({error}).", "Fetch or make it again.") from None


def _stored_rows(path: Path, archive: zipfile.ZipFile) -> StoredRows | None:
    """The images of an archive, of which every byte has been checked; None where they must be read as a whole."""
    member_name = f"{IMAGES}.npy"
    if member_name not in archive.namelist():
        return None
    info = archive.getinfo(member_name)
    with archive.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(member) != (1, 0):
            return None
        shape, in_columns, dtype = np.lib.format.read_array_header_1_0(member)
        header_bytes = member.tell()
        if in_columns or not shape or dtype.hasobject:
            return None
        while member.read(BLOCK):  # to its end, where the checksum is compared
            pass
    if header_bytes + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{IMAGES} is cut off")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    first = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes + header_bytes
    return StoredRows(path, first, shape, dtype)
