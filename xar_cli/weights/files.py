"""Weights from any source: opened, recognised, matched with a recipe, and loaded into a network.

Sources: published `.pth` files and others of their layout, the original's training checkpoints, our run
folders, checkpoints and exports, and `hf://` names of any of these. Owns which of these a source is, and
loading with the memory of the weights alone. Names are published.py's business, recipes fit.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xar_cli.checkpoint import STATE_FILE, require_checkpoint, require_whole
from xar_cli.config.recipes import load_config_file, validate
from xar_cli.config.schema import Config
from xar_cli.errors import UserError
from xar_cli.hub import local_file, sha256_of
from xar_cli.model.transformer import XAR
from xar_cli.run_dir import RunDir, is_there
from xar_cli.tensor_files import State, copy_and_release, file_mappings, is_state, read_tensor_file
from xar_cli.weights.fit import Layout, layout_of, network_of_state, require_fit, require_same_network
from xar_cli.weights.published import check_ours, check_published, is_derived, our_shapes, parts

Kind = Literal["ema", "raw", "unstated"]

FORMAT = "xar-weights"  # value of the metadata key "xar_format" in our exports
VERSION = "1"
RAW, AVERAGES = "model.safetensors", "ema-"  # the raw weights in a checkpoint, and what names of averages begin with


@dataclass(frozen=True, kw_only=True)
class FoundWeights:
    """One set of weights, found but not yet matched with a recipe: its tensors are mapped from disk.

    Attributes:
        source: as it was given.
        path: the file that holds the tensors.
        layout: `published` names, or `xar`: the names of our network.
        kind: the average of the weights over training, the weights themselves, or not stated by the file.
        stored: the recipe that the file or its run carries, if any.
        state: the tensors.
        epoch: of training, where the source tells.
        step: of the optimizer, where the source tells.
        class_names: names of the labels, where the source tells.
    """

    source: str
    path: Path
    layout: Layout
    kind: Kind
    stored: Config | None
    state: Mapping[str, Tensor] = field(repr=False)
    epoch: int | None = None
    step: int | None = None
    class_names: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the file, as `sha256sum` prints it; reads the whole file at the first call."""
        return sha256_of(self.path)

    @property
    def network(self) -> dict[str, int]:
        """Width, depth, tokens, channels and classes, as the shapes tell them."""
        return network_of_state(self.state, self.layout)

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that occur among the parameters, in alphabetical order."""
        found = {tensor.dtype for name, tensor in self.state.items() if not is_derived(name)}
        return sorted(str(dtype).removeprefix("torch.") for dtype in found)


@dataclass(frozen=True, kw_only=True)
class WeightsFile(FoundWeights):
    """Weights with their recipe; every name and shape has been checked against it.

    Attributes:
        config: the recipe: the one asked for, or stored with the weights, or found by shape.
    """

    config: Config

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
    """Open a source of weights and match it with its recipe, without loading the tensors.

    Of a run or a checkpoint, the averages or the raw weights are read once, for their checksums; of a file in one, it.

    Args: as `load_weights`.

    Raises:
        UserError: there is no such source, it is damaged or unsafe, it does not fit the recipe, or it lacks the set
            that was asked for.
    """
    return with_recipe(find_weights(source, ema=ema), config)


def with_recipe(found: FoundWeights, config: Config | None) -> WeightsFile:
    """Match weights with the recipe asked for, or stored with them, or found by shape; errors as `open_weights`."""
    name = f"'{found.source}'"
    if found.stored is not None and config is not None:
        require_same_network(found.stored, config, name)
    fitting = require_fit(found.network, config or found.stored, name)
    (check_published if found.layout == "published" else check_ours)(found.state, fitting, name)
    return WeightsFile(config=fitting, **{item.name: getattr(found, item.name) for item in fields(found)})


def find_weights(source: str | Path, *, ema: bool = True) -> FoundWeights:
    """Open a source of weights and recognise it, whatever network it is of; errors as `open_weights`."""
    path = local_file(source)
    files = AVERAGES if ema else RAW
    if is_there(path / STATE_FILE):
        require_whole(path, files)
        return _find_in_checkpoint(str(source), path, ema)
    if path.is_dir():
        try:
            return _find_in_checkpoint(str(source), require_checkpoint(RunDir(path), files).folder, ema)
        except FileNotFoundError:  # the run trains, and keeps its newest few checkpoints
            raise removed(str(source)) from None
    for file in (path, path.resolve()):  # a link to a file in a checkpoint is that file
        if _is_in_checkpoint(file):
            require_whole(file.parent, file.name)
            if not ema and file.name != RAW:
                raise UserError(f"'{source}' does not hold raw weights.", f"Leave --raw away, or give {RAW}.")
            return _find_group(str(source), file)
    content, metadata = read_tensor_file(path)
    if metadata.get("xar_format") == FORMAT:
        return _find_export(str(source), path, content, metadata, ema)
    name = f"'{source}'"
    state, kind, epoch = _choose_set(content, ema, name)
    layout = layout_of(state, name)
    return FoundWeights(source=str(source), path=path, layout=layout, kind=kind, stored=None, state=state, epoch=epoch)


def removed(source: str) -> UserError:
    """What to say of a run that has removed a checkpoint meanwhile."""
    return UserError(
        f"A checkpoint of '{source}' was removed while it was opened.", "Run the command again.", exit_code=1
    )


def _choose_set(content: Any, ema: bool, name: str) -> tuple[Mapping[str, Tensor], Kind, int | None]:
    """The state dict inside a bare file or a training checkpoint of the original, its kind, its epoch."""
    if is_state(content):
        if not ema:
            raise UserError(f"{name} holds one set of weights, not raw and averaged ones.", "Leave --raw away.")
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


def _find_in_checkpoint(source: str, folder: Path, ema: bool) -> FoundWeights:
    """The weights in a checkpoint folder of one of our runs: the recipe's first average, or the raw ones."""
    files = list(_read_state(folder)["files"])
    wanted = [file for file in files if file.startswith(AVERAGES)] if ema else [RAW]
    if not wanted or wanted[0] not in files:
        kind = "averaged" if ema else "raw"
        raise UserError(f"The checkpoint '{folder}' has no {kind} weights.", "Check that it is whole.")
    return _find_group(source, folder / wanted[0])


def _find_group(source: str, path: Path) -> FoundWeights:
    """One tensor group of a checkpoint `RUN/checkpoints/step-...`: its raw weights or an average."""
    run = RunDir(path.parent.resolve().parent.parent).require()
    content, _ = read_tensor_file(path)
    return FoundWeights(
        source=source,
        path=path,
        layout=layout_of(content, f"'{source}'"),
        kind="raw" if path.name == RAW else "ema",
        stored=load_config_file(run.config),
        state=content,
        step=_read_state(path.parent)["step"],
        class_names=tuple(run.read_identity().get("class_names", ())),
    )


def _find_export(source: str, path: Path, state: State, metadata: Mapping[str, str], ema: bool) -> FoundWeights:
    """A file that `export_weights` wrote."""
    name = f"'{source}'"
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{name} has version {metadata.get('version')} of our format; this program reads {VERSION}.",
            "Use a newer xar.",
        )
    try:
        kind, recipe = metadata["kind"], json.loads(metadata["recipe"])
        class_names = json.loads(metadata["class_names"])
        if not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
            raise TypeError("class_names is no list of strings")
        epoch, step = (int(metadata[key]) if key in metadata else None for key in ("epoch", "step"))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"What {name} says of its weights is damaged: {type(error).__name__}: {error}.",
            "Write it again with `xar weights convert`.",
        ) from None
    if not ema and kind != "raw":
        raise UserError(f"{name} does not hold raw weights.", "Leave --raw away.")
    return FoundWeights(
        source=source,
        path=path,
        layout=layout_of(state, name),
        kind="ema" if kind == "ema" else "raw" if kind == "raw" else "unstated",
        stored=validate(recipe, f"The recipe inside {name}"),
        state=state,
        epoch=epoch,
        step=step,
        class_names=tuple(class_names),
    )


def _is_in_checkpoint(file: Path) -> bool:
    """Whether a file is one of those that a checkpoint in its folder consists of."""
    try:
        return file.name in _read_state(file.parent)["files"]
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError):  # there is none, or it is another program's
        return False
    except (OSError, ValueError):  # `require_whole` says what is wrong with it
        return is_checkpoint(file.parent)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint: its state names files or, where that cannot be read, it is called like one."""
    try:
        return "files" in _read_state(folder)
    except (FileNotFoundError, NotADirectoryError, TypeError):
        return False
    except (OSError, ValueError):
        return re.fullmatch(r"step-\d+", folder.resolve().name) is not None


def _read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return dict(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
