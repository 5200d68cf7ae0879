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
from xar_cli.model.entities import build_grouping, places_in
from xar_cli.train.state import TrainState
from xar_cli.weights import WeightsFile, open_weights
from xar_cli.weights.fit import facts_of, network_of_config, require_equal
from xar_cli.weights.ranks import open_on_all

CLASS_TABLE = "class_embedding.weight"
POSITIONS = ("pos_encoder", "pos_decoder")  # (1, N, D), in the order of the sequence
FREE = ("classes", "num_classes", "entity")  # may be others than those of the weights to start from


def source_name(source: str) -> str:
    """A source of weights as run.json has it: a path made absolute, a hub name as it is."""
    return os.path.abspath(source) if parse_hub_name(source) is None else source


def init_from(state: TrainState, source: str, class_names: Sequence[str], ranks: Ranks) -> dict[str, Any]:
    """Set model and averages from a source of weights, as `--init-from` does; all ranks call this.

    Classes are matched by name where both sides know their names, else by number where their count is the same. A
    class without a match keeps its fresh embedding; the null class is always taken over. Learned positions go with
    their tokens, where the entities take them in another order.

    Returns:
        What run.json tells of it: source, file and the file's sha256.

    Raises:
        UserError: no such source, another network than the recipe's, or not the same file on all ranks.
    """
    config = state.config
    found, sha256 = open_on_all(source, lambda file: open_start(file, config), ranks)
    theirs = dict(found.load("cpu").named_parameters())
    table = fresh_class_table(config)
    kept = matching_classes(config, found.config, class_names, found.class_names)
    for mine, other in kept.items():
        table[mine] = theirs[CLASS_TABLE][other].detach()
    log.info(
        "Starting from '%s': %d of %d class embeddings taken over.", source, len(kept) - 1, config.data.num_classes
    )
    places = places_for(config, found.config)
    for name, parameter in state.model.named_parameters():
        tensor = table if name == CLASS_TABLE else theirs[name].detach()
        if name in POSITIONS and places is not None:
            tensor = tensor[:, places]
        assign(parameter, tensor)
        for decay in config.train.ema_decays:
            assign(state.averages.tensors(decay)[name], tensor)
    return {"source": source_name(source), "file": str(found.path.absolute()), "sha256": sha256}


def open_start(source: str, config: Config) -> WeightsFile:
    """Weights that a run of a recipe can start from.

    Only their classes may be others, and the order in which their entities take the tokens of the grid. A file that
    carries no recipe tells no more than its shapes: it counts as of the shipped recipe that these fit.

    Raises:
        UserError: no such source, or another network than the recipe's.
    """
    found, name = open_weights(source), f"'{source}'"
    shapes, facts = (found.network, network_of_config(config)), (facts_of(found.config), facts_of(config))
    for theirs, ours in [shapes] if found.stored is None else [shapes, facts]:
        require_equal(
            {key: value for key, value in theirs.items() if key not in FREE}, ours, config.name, name,
            "Choose a recipe with the same network, image size, tokenizer and tokens; only the classes may differ.",
        )  # fmt: skip
    if found.stored is None and found.config.grid != config.grid:
        log.warning(
            "'%s' does not say on which grid it was trained; recipe '%s', which it fits, has %s tokens and not %s.",
            source, found.config.name, sides_text(found.config.grid), sides_text(config.grid),
        )  # fmt: skip
    elif places_for(config, found.config) is None:
        raise UserError(
            f"{name} was trained on {found.config.entity_text}; recipe '{config.name}' has {config.entity_text}: its "
            "learned positions do not fit.",
            "Choose a recipe whose entities are made of the same tokens.",
        )
    return found


def places_for(ours: Config, theirs: Config) -> torch.Tensor | None:
    """Where each token of ours stands in their sequence, (N,); None where the tokens are not the same."""
    return places_in(*(build_grouping(config.entity, config.grid) for config in (theirs, ours)))


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
