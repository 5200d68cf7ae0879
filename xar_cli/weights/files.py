"""Weights from any source: opened, recognised, matched with a recipe, and loaded into a network.

Sources: published `.pth` files and others of their layout, the original's training checkpoints, our run
folders, checkpoints and exports, and `hf://` names of any of these. Owns which of these a source is, and
loading with the memory of the weights alone. Names are published.py's business, recipes fit.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xar_cli.checkpoint import STATE_FILE, require_checkpoint
from xar_cli.config.recipes import load_config_file, validate
from xar_cli.config.schema import Config
from xar_cli.errors import UserError
from xar_cli.hub import local_file, sha256_of
from xar_cli.model.transformer import XAR
from xar_cli.run_dir import RunDir
from xar_cli.tensor_files import State, copy_and_release, file_mappings, is_state, read_tensor_file
from xar_cli.weights.fit import Layout, layout_of, network_of_state, require_fit, require_same_network
from xar_cli.weights.published import check_ours, check_published, is_derived, our_shapes, parts

Kind = Literal["ema", "raw", "unstated"]

FORMAT = "xar-weights"  # value of the metadata key "xar_format" in our exports
VERSION = "1"


@dataclass(frozen=True)
class WeightsFile:
    """One set of weights, opened and checked: its tensors are mapped from disk, not yet in memory.

    Attributes:
        source: as it was given.
        path: the file that holds the tensors.
        layout: `published` names, or `xar`: the names of our network.
        kind: the average of the weights over training, the weights themselves, or not stated by the file.
        config: the recipe: asked for, or stated by the file or its run, or found by shape.
        state: the tensors.
        epoch: of training, where the source tells.
        step: of the optimizer, where the source tells.
        class_names: names of the labels, where the source tells.
    """

    source: str
    path: Path
    layout: Layout
    kind: Kind
    config: Config
    state: Mapping[str, Tensor] = field(repr=False)
    epoch: int | None = None
    step: int | None = None
    class_names: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the file, as `sha256sum` prints it; reads the whole file at the first call."""
        return sha256_of(self.path)

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that occur among the parameters, in alphabetical order."""
        found = {tensor.dtype for name, tensor in self.state.items() if not is_derived(name)}
        return sorted(str(dtype).removeprefix("torch.") for dtype in found)

    def load(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> XAR:
        """The network with these weights, in eval mode.

        It is built without memory and filled tensor by tensor, straight on the device. The host needs memory
        for one tensor when the device is a GPU, for the weights and one tensor when it is the CPU. (Pickles
        from before PyTorch 1.6 cannot be mapped and are read whole first.)
        """
        mappings = file_mappings()
        with torch.device("meta"):
            model = XAR(self.config)
        filled: State = {}
        for name, shape in our_shapes(self.config).items():
            filled[name] = torch.zeros(shape, device=device, dtype=dtype)
        if self.layout == "xar":
            for name, target in filled.items():
                copy_and_release(target, self.state[name], mappings)
        else:
            for part in parts(self.config):
                copy_and_release(filled[part.ours][part.place], self.state[part.published], mappings)
        model.load_state_dict(filled, strict=True, assign=True)
        return model.to(device).eval()  # the table of positions, which no file holds, is still to be moved


def load_weights(
    source: str | Path,
    config: Config | None = None,
    *,
    ema: bool = True,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> tuple[XAR, WeightsFile]:
    """The network that a source of weights holds, on a device, and what is known of the weights.

    Args:
        source: a file, a run or checkpoint folder, or `hf://owner/repo/file[@revision]`.
        config: the recipe; None takes the one stored with the weights, or the shipped one that their shapes
            fit.
        ema: where a source holds both sets: the averaged weights (True) or the raw ones (False).
        device: where the network goes.
        dtype: of its weights.

    Raises:
        UserError: as `open_weights`.
    """
    weights = open_weights(source, config, ema=ema)
    return weights.load(device, dtype), weights


def open_weights(source: str | Path, config: Config | None = None, *, ema: bool = True) -> WeightsFile:
    """Open a source of weights and match it with its recipe, without reading the tensors.

    Args: as `load_weights`.

    Raises:
        UserError: there is no such source, it is damaged or unsafe, it does not fit the recipe, or it lacks
        the set
            that was asked for.
    """
    path = local_file(source)
    name = f"'{source}'"
    if (path / STATE_FILE).is_file():
        return _open_checkpoint(str(source), path, config, ema)
    if path.is_dir():
        return _open_checkpoint(str(source), require_checkpoint(RunDir(path)).folder, config, ema)
    if (path.parent / STATE_FILE).is_file():
        return _open_group(str(source), path, config)
    content, metadata = read_tensor_file(path)
    if metadata.get("xar_format") == FORMAT:
        weights = _open_export(str(source), path, config, content, metadata)
        if not ema and weights.kind != "raw":
            raise UserError(f"{name} does not hold raw weights.", "Leave --raw away.")
        return weights
    state, kind, epoch = _choose_set(content, ema, name)
    return _checked(str(source), path, config, state, kind, epoch=epoch)


def _choose_set(content: Any, ema: bool, name: str) -> tuple[Mapping[str, Tensor], Kind, int | None]:
    """The state dict inside a bare file or a training checkpoint of the original, its kind, its epoch."""
    if is_state(content):
        if not ema:
            raise UserError(
                f"{name} holds one set of weights, not raw and averaged ones.", "Leave --raw away."
            )
        return content, "unstated", None
    key = "model_ema" if ema else "model"
    if isinstance(content, Mapping) and is_state(content.get(key)):
        epoch = content.get("epoch")
        return content[key], "ema" if ema else "raw", epoch if isinstance(epoch, int) else None
    if isinstance(content, Mapping) and is_state(content.get("model")):
        layout_of(content["model"], name)  # another kind of network is the likelier fault: say that first
        raise UserError(f"{name} holds no averaged weights ('model_ema').", "Take its raw ones: --raw.")
    raise UserError(
        f"{name} holds no weights: neither a state dict nor a checkpoint with 'model' or 'model_ema'.",
        "Check that this is the file you mean.",
    )


def _open_checkpoint(source: str, folder: Path, config: Config | None, ema: bool) -> WeightsFile:
    """The weights in a checkpoint folder of one of our runs: the recipe's first average, or the raw ones."""
    files = list(_read_json(folder / STATE_FILE)["files"])
    wanted = [file for file in files if file.startswith("ema-")] if ema else ["model.safetensors"]
    if not wanted or wanted[0] not in files:
        raise UserError(
            f"The checkpoint '{folder}' has no {'averaged' if ema else 'raw'} weights.",
            "Check that it is whole.",
        )
    return _open_group(source, folder / wanted[0], config)


def _open_group(source: str, path: Path, config: Config | None) -> WeightsFile:
    """One tensor group of a checkpoint `RUN/checkpoints/step-...`: its raw weights or an average."""
    run = RunDir(path.resolve().parent.parent.parent).require()
    stored = load_config_file(run.config)
    if config is not None:
        require_same_network(stored, config, f"'{source}'")
    content, _ = read_tensor_file(path)
    return _checked(
        source,
        path,
        config or stored,
        content,
        "raw" if path.stem == "model" else "ema",
        step=_read_json(path.parent / STATE_FILE)["step"],
        class_names=_read_json(run.identity).get("class_names", ()),
    )


def _open_export(
    source: str, path: Path, config: Config | None, state: State, metadata: Mapping[str, str]
) -> WeightsFile:
    """A file that `save_export` wrote."""
    name = f"'{source}'"
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{name} has version {metadata.get('version')} of our format; this program reads {VERSION}.",
            "Use a newer xar.",
        )
    stored = validate(json.loads(metadata["recipe"]), f"The recipe inside {name}")
    if config is not None:
        require_same_network(stored, config, name)
    kind: Kind = (
        "ema" if metadata.get("kind") == "ema" else "raw" if metadata.get("kind") == "raw" else "unstated"
    )
    facts = {key: int(metadata[key]) for key in ("epoch", "step") if key in metadata}
    return _checked(
        source,
        path,
        config or stored,
        state,
        kind,
        class_names=json.loads(metadata.get("class_names", "[]")),
        **facts,
    )


def _checked(
    source: str,
    path: Path,
    config: Config | None,
    state: Mapping[str, Tensor],
    kind: Kind,
    epoch: int | None = None,
    step: int | None = None,
    class_names: Sequence[str] = (),
) -> WeightsFile:
    """Match a state dict with its recipe and check every name and shape."""
    name = f"'{source}'"
    layout = layout_of(state, name)
    fitting = require_fit(network_of_state(state, layout), config, name)
    (check_published if layout == "published" else check_ours)(state, fitting, name)
    return WeightsFile(source, path, layout, kind, fitting, state, epoch, step, tuple(class_names))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
