"""Files of tensors, written, and opened without running anything in them; the check of their names and shapes.

Owns: which kinds of file are read (safetensors, PyTorch's pickles), the allow-list for pickles, the error for
a state that does not fit. Knows no model: what the names mean is the business of `tokenizer` and `weights`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from xar_cli.errors import UserError

State = dict[str, torch.Tensor]

# What a pickle may hold beside tensors and plain values: the arguments that the original training stores.
ALLOWED_CLASSES: tuple[type, ...] = (argparse.Namespace,)

# What torch.load raises for a file that is cut short or is something else.
_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError,
    struct.error, SafetensorError,
)  # fmt: skip

NAMES_SHOWN = 3  # a refused state names this many tensors of each fault


def read_tensor_file(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a safetensors file or a PyTorch pickle; which one it is follows from its first bytes.

    Tensors are mapped from disk and not copied where the format allows: memory is taken when they are used.

    Returns:
        What the file holds (a flat dict for safetensors, any nesting for a pickle), and its metadata.

    Raises:
        UserError: no such file, damaged, or a pickle with more than tensors, plain values, `ALLOWED_CLASSES`.
    """
    if path.is_dir():
        raise UserError(f"'{path}' is a folder.", "Give the file in it.")
    if not path.is_file():
        raise UserError(f"There is no file '{path}'.", "Check the path of the weights.")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror}.", "Check the permissions of the file.") from None
    if head[8:9] == b"{":
        return read_safetensors(path)
    return read_pickle(path), {}


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """The tensors of a safetensors file, mapped from disk, and its metadata; UserError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, "safetensors file", error) from None


def write_safetensors(tensors: State, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors of the CPU, to be read by whoever may read its folder where the disk knows such modes.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        save_file(tensors, path, dict(metadata) if metadata else None)
    except SafetensorError as error:  # of its own class, whatever the system says
        raise OSError(str(error)) from error
    with contextlib.suppress(OSError):  # of exFAT, and network drives that know no modes
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors 0.8 leaves it to its owner alone


def read_pickle(path: Path) -> Any:
    """What a PyTorch pickle holds, read with `weights_only=True`: nothing in the file can run."""
    try:
        with torch.serialization.safe_globals(list(ALLOWED_CLASSES)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file")  # TorchScript: the error says so
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own words advise to open it all the same
        named = f" ({asked[1]})" if asked else ""
        raise UserError(
            f"'{path}' is no file of weights, or holds objects that could run code{named}; it was not opened.",
            "Use a file that holds only tensors, or convert it to safetensors where you trust it.",
        ) from None
    except _DAMAGE as error:
        if "weights_only" in str(error):  # the same advice
            raise UserError(
                f"'{path}' is a TorchScript archive or a .tar of an old PyTorch, or no PyTorch file at all.",
                "Use a file that `torch.save` wrote, or safetensors.",
            ) from None
        raise _damaged(path, "PyTorch file", error) from None


def file_mappings() -> list[tuple[int, int]]:
    """The address ranges that this process has mapped from files; empty where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    ranges = []
    for line in maps.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            start, _, end = addresses.partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def copy_and_release(target: torch.Tensor, source: torch.Tensor, mappings: Sequence[tuple[int, int]]) -> None:
    """Copy a tensor into `target` (any device and dtype); if it is mapped from a file, let go of its pages.

    So loading takes the memory of the weights and one tensor more, not the file's size on top. Nothing is
    lost: the next look at `source` reads the file (or the system's cache of it) again.

    Args:
        target: where the values go.
        source: a tensor of the same shape.
        mappings: `file_mappings()`, taken after the file was opened.
    """
    target.copy_(source)
    if source.device.type != "cpu" or not source.is_contiguous():
        return
    start, end = source.data_ptr(), source.data_ptr() + source.nbytes
    if any(first <= start and end <= last for first, last in mappings):
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def is_state(value: Any) -> bool:
    """Whether a value is a non-empty mapping of names to tensors, which have values."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(
            isinstance(key, str) and isinstance(item, torch.Tensor) and not item.is_meta for key, item in value.items()
        )
    )


def check_state(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, Sequence[int]], what: str, next_step: str
) -> None:
    """Raise a UserError unless `state` has exactly the expected names and shapes, in dense floating point.

    Args:
        state: the tensors of a file.
        expected: the shape that each name must have.
        what: the file and what it was taken for; opens the error's sentence.
        next_step: what the person can do about it.
    """
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    misshapen = [
        f"{name} is {_shape(state[name].shape)}, not {_shape(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    unusable = [
        f"{name} is {str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix('torch.')}"
        for name, tensor in state.items()
        if name in expected and not (tensor.is_floating_point() and tensor.layout == torch.strided)
    ]
    found = {"missing": missing, "unknown": extra, "misshapen": misshapen, "unusable": unusable}
    faults = [f"{len(names)} {kind}: {_first(names)}" for kind, names in found.items() if names]
    if faults:
        raise UserError(f"{what} does not fit: {'; '.join(faults)}.", next_step)


def _first(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shape(shape: Iterable[int]) -> str:
    return f"({', '.join(str(size) for size in shape)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _damaged(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(
        f"'{path}' cannot be read as a {kind}: {_first_line(error)}.",
        "The file may be damaged or cut short: fetch it again.",
    )
