"""Weights out: into safetensors that carry their recipe and class table, or into the published layout.

Every conversion keeps the values bit for bit and the dtype as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from xar_cli.config.schema import Config
from xar_cli.data.imagenet import imagenet_names
from xar_cli.errors import UserError
from xar_cli.run_dir import require_possible, require_writable
from xar_cli.tensor_files import State
from xar_cli.weights.files import FORMAT, VERSION, WeightsFile
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
        UserError: another suffix, our names in a .pth file, or no room on the disk.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise UserError(f"'{out}' has no suffix that tells the format.", "Write to a .safetensors or .pth file.")
    layout = layout or ("published" if out.suffix == ".pth" else "xar")
    if out.suffix == ".pth" and layout == "xar":
        raise UserError("A .pth file has no room for the recipe.", "Write our layout to a .safetensors file.")
    require_possible(out)
    require_writable(out.parent, sum(tensor.nbytes for tensor in weights.state.values()), "the weights")
    state = as_layout(weights, layout)
    if out.suffix == ".pth":
        _write(out, lambda path: torch.save(state, path))
    else:
        contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
        _write(out, lambda path: save_file(contiguous, path, metadata=metadata_of(weights)))
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


def _write(out: Path, write: Callable[[Path], None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
