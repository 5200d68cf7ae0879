"""Which recipe a set of weights fits: read from shapes, or from the config stored beside them.

Owns the comparison and its errors. Dropout, training and sampling settings never count: they are free to
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from xar_cli.config.recipes import list_recipes, load_recipe
from xar_cli.config.schema import Config
from xar_cli.errors import UserError
from xar_cli.model.entities import build_grouping
from xar_cli.tokenizer.kl16 import is_kl16

Layout = Literal["published", "xar"]
PUBLISHED_RECIPES = ("base", "large", "huge")

# For each layout the names that tell the network: class table, positions, input projection, one bias a block.
_TELLING = {
    "published": (
        "class_emb.weight", "encoder_pos_embed_learned", "z_proj.weight", "encoder_blocks.{}.attn.qkv.bias",
    ),
    "xar": ("class_embedding.weight", "pos_encoder", "token_proj.weight", "encoder.{}.attention.qkv.bias"),
}  # fmt: skip
_ROPE_TABLE = "encoder_blocks.0.attn.rope.freqs_cos"  # (N, head width): the only trace of the number of heads


def layout_of(state: Mapping[str, Tensor], what: str) -> Layout:
    """Whether a state dict has the published names or ours; raises UserError where it has neither."""
    for layout, names in _TELLING.items():
        found = [state.get(name.format(0)) for name in names]
        if all(tensor is not None and tensor.ndim >= 2 for tensor in found[:-1]) and found[-1] is not None:
            return "published" if layout == "published" else "xar"
    if is_kl16(state):
        raise UserError(f"{what} holds the tokenizer KL-16, not a generator.", "Give this file to --tokenizer-weights.")
    first = ", ".join(list(state)[:3])
    raise UserError(
        f"{what} holds no xAR weights: its first tensors are {first}.",
        "Give a file with the published names, or one that xar wrote.",
    )


def network_of_state(state: Mapping[str, Tensor], layout: Layout) -> dict[str, int]:
    """What the shapes tell of the network; `heads` only where the file has the buffers that tell it."""
    classes, positions, projection, block = _TELLING[layout]
    depth = 0
    while block.format(depth) in state:
        depth += 1
    dim = state[classes].shape[-1]
    network = {
        "dim": dim,
        "depth": depth,
        "tokens": state[positions].shape[-2],
        "channels": state[projection].shape[-1],
        "classes": state[classes].shape[0] - 1,
    }
    rope = state.get(_ROPE_TABLE)
    if rope is not None and rope.ndim == 2 and rope.shape[1] > 0 and dim % rope.shape[1] == 0:
        network["heads"] = dim // rope.shape[1]
    return network


def network_of_config(config: Config) -> dict[str, int]:
    """The same facts of a recipe."""
    return {
        "dim": config.model.dim,
        "depth": config.model.depth,
        "tokens": build_grouping(config.entity, config.grid).num_tokens,
        "channels": config.latent_channels,
        "classes": config.data.num_classes,
        "heads": config.model.heads,
    }


def fitting_recipes(network: Mapping[str, int]) -> list[str]:
    """The shipped recipes with such a network, the published ones first; ablations may share `base`'s."""
    names = [*PUBLISHED_RECIPES, *(name for name in list_recipes() if name not in PUBLISHED_RECIPES)]
    return [name for name in names if _agrees(network, network_of_config(load_recipe(name)))]


def require_fit(network: Mapping[str, int], config: Config | None, what: str) -> Config:
    """The config, checked against the shapes of the weights; without one, the first shipped recipe that fits.

    Raises:
        UserError: the weights are of another network than the recipe's, or no shipped recipe has it.
    """
    fitting = fitting_recipes(network)
    if config is None:
        if fitting:
            return load_recipe(fitting[0])
        raise UserError(
            f"{what} is a network of {_describe(network)}; no shipped recipe has that.",
            "Give the recipe that it was trained with: --recipe FILE.yaml.",
        )
    asked = network_of_config(config)
    if not _agrees(network, asked):
        raise UserError(
            f"{what} is a network of {_describe(network)}; recipe '{config.name}' asks for "
            f"{_describe({key: asked[key] for key in network})}.",
            f"Use --recipe {fitting[0]}, which it fits." if fitting else "Give the recipe it was trained with.",
        )
    return config


def require_same_network(stored: Config, asked: Config, what: str) -> None:
    """Raise a UserError unless two configs make the same network on the same latents."""
    advice = "Leave --recipe, and --set of these, away: the weights carry their own."
    require_equal(facts_of(stored), facts_of(asked), asked.name, what, advice)


def require_equal(theirs: Mapping[str, Any], ours: Mapping[str, Any], recipe: str, what: str, advice: str) -> None:
    """Raise a UserError that lists all facts in which weights differ from a recipe."""
    differing = [key for key in theirs if theirs[key] != ours[key]]
    if differing:
        raise UserError(
            f"{what} was trained with {', '.join(f'{key} {theirs[key]}' for key in differing)}; recipe '{recipe}' asks "
            f"for {', '.join(f'{key} {ours[key]}' for key in differing)}.",
            advice,
        )


def facts_of(config: Config) -> dict[str, Any]:
    """What makes a network and its latents."""
    return {
        "tokenizer": config.tokenizer.model_dump(),
        "image_size": config.data.image_size,
        "image_channels": config.data.image_channels,
        "num_classes": config.data.num_classes,
        "entity": config.entity.model_dump(),
        "dim": config.model.dim,
        "depth": config.model.depth,
        "heads": config.model.heads,
    }


def _agrees(network: Mapping[str, int], other: Mapping[str, int]) -> bool:
    return all(other[key] == value for key, value in network.items())


def _describe(network: Mapping[str, int]) -> str:
    heads = f", {network['heads']} heads" if "heads" in network else ""
    return (
        f"width {network['dim']}, {network['depth']} + {network['depth']} blocks{heads}, "
        f"{network['tokens']} tokens of {network['channels']} channels, {network['classes']} classes"
    )
