"""What a file of weights is, as one plain record: for `xar weights info` and for model cards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from xar_cli.config.schema import Config
from xar_cli.hub import local_file, sha256_of
from xar_cli.tensor_files import read_tensor_file
from xar_cli.tokenizer.kl16 import identity_of, is_kl16, read_kl16_state
from xar_cli.weights.files import FoundWeights, WeightsFile, find_weights, with_recipe
from xar_cli.weights.fit import fitting_recipes, network_of_config
from xar_cli.weights.published import is_derived, published_shapes


def describe_source(source: str | Path, config: Config | None = None, *, ema: bool = True) -> dict[str, Any]:
    """Everything that is known of a source of weights, generator or tokenizer; reads the file for its sha256.

    Args:
        source: as `open_weights` takes it.
        config: the recipe; None takes the stored one or the first that fits, and is content with none.
        ema: which set, where a source holds both.

    Raises:
        UserError: as `open_weights`.
    """
    path = local_file(source)
    if path.is_file() and is_kl16(content := read_tensor_file(path)[0]):
        return _describe_kl16(str(source), path, content)
    found: FoundWeights = find_weights(source, ema=ema)
    fitting = fitting_recipes(found.network)
    if config is not None or found.stored is not None or fitting:
        found = with_recipe(found, config)
    recipe = found.config if isinstance(found, WeightsFile) else None
    return {
        "source": found.source,
        "file": str(found.path),
        "architecture": "xAR",
        **(found.network if recipe is None else network_of_config(recipe)),
        "entity": None if recipe is None else recipe.entity.model_dump(),
        "parameters": _count(found) if recipe is None else num_parameters(recipe),
        "dtypes": found.dtypes,
        "layout": found.layout,
        "kind": found.kind,
        "epoch": found.epoch,
        "step": found.step,
        "recipe": None if recipe is None else recipe.name,
        "fits": fitting,
        "class_names": len(found.class_names),
        "bytes": found.path.stat().st_size,
        "sha256": found.sha256,
    }


def num_parameters(config: Config) -> int:
    """Parameters of a recipe's network; derived buffers and the MLP's padding are not counted."""
    return sum(math.prod(shape) for shape in published_shapes(config).values())


def _count(found: FoundWeights) -> int:
    return sum(tensor.numel() for name, tensor in found.state.items() if not is_derived(name))


def _describe_kl16(source: str, path: Path, content: Any) -> dict[str, Any]:
    state = read_kl16_state(path, content)
    return {
        "source": source,
        "file": str(path),
        "architecture": "KL-16 tokenizer",
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "identity": identity_of(state),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }
