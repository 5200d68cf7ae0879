"""Starting from weights that exist: published ones, another run's, with a new class table where classes differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from xar_cli.config.schema import Config, sides_text
from xar_cli.distributed import Ranks, assign
from xar_cli.errors import UserError
from xar_cli.hub import parse_hub_name
from xar_cli.logs import log
from xar_cli.train.state import TrainState
from xar_cli.weights import WeightsFile, open_weights

CLASS_TABLE = "class_embedding.weight"


def source_name(source: str) -> str:
    """A source of weights as run.json has it: a path made absolute, a hub name as it is."""
    return os.path.abspath(source) if parse_hub_name(source) is None else source


def init_from(state: TrainState, source: str, class_names: Sequence[str], ranks: Ranks) -> dict[str, Any]:
    """Set model and averages from a source of weights, as `--init-from` does; all ranks call this.

    Classes are matched by name where both sides know their names, else by number where their count is the same. A
    class without a match keeps its fresh embedding; the null class is always taken over.

    Returns:
        What run.json tells of it: source, file and the file's sha256.

    Raises:
        UserError: no such source, or another network (the tensors that do not fit are named).
    """
    config = state.config
    found = open_weights(source)
    theirs = dict(found.load("cpu").named_parameters())
    ours = {name: parameter.shape for name, parameter in state.model.named_parameters()}
    unlike = [
        name
        for name, shape in ours.items()
        if name not in theirs or (theirs[name].shape != shape and name != CLASS_TABLE)
    ]
    if unlike or theirs[CLASS_TABLE].shape[1] != ours[CLASS_TABLE][1]:
        raise UserError(
            f"'{source}' is of another network than recipe '{config.name}': "
            f"{', '.join(unlike[:3]) or CLASS_TABLE} differ.",
            "Choose a recipe with the same width, depth, image size and entities; only the classes may differ.",
        )
    _check_grid(found, config)
    table = fresh_class_table(config)
    kept = matching_classes(config, found.config, class_names, found.class_names)
    for mine, other in kept.items():
        table[mine] = theirs[CLASS_TABLE][other].detach()
    log.info(
        "Starting from '%s': %d of %d class embeddings taken over.", source, len(kept) - 1, config.data.num_classes
    )
    for name, parameter in state.model.named_parameters():
        tensor = table if name == CLASS_TABLE else theirs[name].detach()
        assign(parameter, tensor)
        for decay in config.train.ema_decays:
            assign(state.averages.tensors(decay)[name], tensor)
    return ranks.on_main(
        lambda: {"source": source_name(source), "file": str(found.path.absolute()), "sha256": found.sha256}
    )


def _check_grid(found: WeightsFile, config: Config) -> None:
    """Refuse weights of another grid with as many tokens: shapes agree, and the learned positions mean other places."""
    theirs, ours = sides_text(found.config.grid), sides_text(config.grid)
    if found.stored is not None and theirs != ours:
        raise UserError(
            f"'{found.source}' was trained on a grid of {theirs} tokens, recipe '{config.name}' has {ours}: its "
            "positions do not fit.",
            "Choose a recipe with the same image size and tokenizer.",
        )
    if theirs != ours:
        log.warning(
            "'%s' does not say on which grid it was trained; recipe '%s', which it fits, has %s tokens and not %s.",
            found.source, found.config.name, theirs, ours,
        )  # fmt: skip


def fresh_class_table(config: Config) -> torch.Tensor:
    """New embeddings for all classes and the null class: (classes + 1, D), normal with deviation 0.02."""
    generator = torch.Generator().manual_seed(config.train.seed)
    return 0.02 * torch.randn(config.data.num_classes + 1, config.model.dim, generator=generator)


def matching_classes(
    ours: Config, theirs: Config, our_names: Sequence[str], their_names: Sequence[str]
) -> dict[int, int]:
    """Our label -> their label, for every class that both have; the null class is always among them."""
    found = {ours.null_label: theirs.null_label}
    if our_names and their_names:
        places = {name: place for place, name in enumerate(their_names[: theirs.data.num_classes])}
        ours_in_use = enumerate(our_names[: ours.data.num_classes])
        found.update({label: places[name] for label, name in ours_in_use if name in places})
    elif ours.data.num_classes == theirs.data.num_classes:
        found.update({label: label for label in range(ours.data.num_classes)})
    return found
