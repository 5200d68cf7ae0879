"""Weights out: into safetensors that carry their recipe and class table, or into the published layout.

Every conversion keeps the values bit for bit and the dtype as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from xar_cli.checkpoint import STATE_FILE
from xar_cli.config.schema import Config
from xar_cli.data.imagenet import imagenet_names
from xar_cli.errors import UserError
from xar_cli.lock import JobLock
from xar_cli.run_dir import flush, is_there, require_writable, temporary_files
from xar_cli.tensor_files import State, write_safetensors
from xar_cli.weights.files import FORMAT, VERSION, WeightsFile, is_checkpoint
from xar_cli.weights.fit import Layout
from xar_cli.weights.published import from_published, to_published

IMAGENET = "ImageNet-1k"  # data.dataset of the published recipes, whose labels are the sorted WordNet ids


def export_weights(weights: WeightsFile, out: Path, layout: Layout | None = None) -> Layout:
    """Write weights to a file, whole or not at all.

    Args:
        weights: what `open_weights` gave.
        out: `*.safetensors` (with recipe and class table in its metadata) or `*.pth` (a bare state dict).
        layout: names inside; None takes ours for safetensors and the published ones for .pth.

    Returns:
        the layout that was written.

    Raises:
        UserError: another suffix, our names in a .pth file, a place where nothing may be written, or no room on the
            disk; with exit code 1: the writing failed.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise UserError(f"'{out}' has no suffix that tells the format.", "Write to a .safetensors or .pth file.")
    layout = layout or ("published" if out.suffix == ".pth" else "xar")
    if out.suffix == ".pth" and layout == "xar":
        raise UserError("A .pth file has no room for the recipe.", "Write our layout to a .safetensors file.")
    _require_place(out, weights.path)
    require_writable(out.parent, sum(tensor.nbytes for tensor in weights.state.values()), "the weights")
    state = as_layout(weights, layout)
    if out.suffix == ".pth":
        _write(out, lambda path: _save_pickle(state, path))
    else:
        _write(out, lambda path: write_safetensors(_apart(state), path, metadata_of(weights)))
    return layout


def as_layout(weights: WeightsFile, layout: Layout) -> State:
    """The tensors under the names of a layout; the published one gets its derived buffers."""
    ours = from_published(weights.state, weights.config) if weights.layout == "published" else dict(weights.state)
    return to_published(ours, weights.config) if layout == "published" else ours


def metadata_of(weights: WeightsFile) -> dict[str, str]:
    """What a safetensors export says of itself: format, recipe, class table, kind, epoch and step."""
    metadata = {
        "xar_format": FORMAT,
        "version": VERSION,
        "kind": weights.kind,
        "recipe": json.dumps(weights.config.model_dump(mode="json", exclude_none=True)),
        "class_names": json.dumps(weights.class_names or class_table(weights.config)),
    }
    for key, value in (("epoch", weights.epoch), ("step", weights.step)):
        if value is not None:
            metadata[key] = str(value)
    return metadata


def class_table(config: Config) -> tuple[str, ...]:
    """Names of the labels where the recipe's data set settles them (ImageNet's WordNet ids), else ()."""
    ids = tuple(sorted(imagenet_names()))
    return ids if config.data.dataset == IMAGENET and config.data.num_classes == len(ids) else ()


def _require_place(out: Path, source: Path) -> None:
    """Raise a UserError where `out` is no place for a file, or where what lies there must stay as it is."""
    if is_there(out):
        if out.is_dir():
            raise UserError(f"'{out}' is a folder.", "Give the name of a file.")
        if out.samefile(source):
            raise UserError(f"'{out}' is the file that the weights are read from.", "Write to another file.")
    if is_checkpoint(out.parent):
        raise UserError(
            f"'{out}' would lie in a checkpoint, with a {STATE_FILE} beside it.",
            "Write it outside the run's checkpoints.",
        )


def _apart(state: State) -> State:
    """The tensors, contiguous and none in the storage of another, as safetensors asks for."""
    apart: State = {}
    storages = set()
    for name, tensor in state.items():
        apart[name] = tensor.contiguous()
        storage = apart[name].untyped_storage().data_ptr()
        if storage in storages:
            apart[name] = apart[name].clone()
        storages.add(storage)
    return apart


def _save_pickle(state: State, path: Path) -> None:
    """`torch.save`, with a full disk told as the OSError that it is."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # of torch, which fails once more when it ends the file
        if not isinstance(error.__context__, OSError):
            raise
        raise error.__context__ from None


def _write(out: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside its place, flush it to disk, then rename it into place: whole or not at all.

    It is written in a folder of its own, since safetensors writes beside its place too.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with JobLock(out.with_name(f".{out.name}.lock"), f"'{out}' is being written") as lock:
            lock.take()
            for left_by_a_kill in temporary_files(out):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)
            try:
                temporary.mkdir()
                write(temporary / out.name)
                flush(temporary / out.name)
                os.replace(temporary / out.name, out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                lock.remove()
    except OSError as error:
        raise UserError(
            f"'{out}' could not be written: {error}.", "Free some space or choose another folder.", exit_code=1
        ) from None
