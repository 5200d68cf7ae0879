"""The published parameter names and ours: one table, read in both directions.

The published layout is a flat state dict whose MLP has its gate and value apart and unpadded; ours has them
in one matrix, each padded with zeros to a multiple of 64. Buffers that follow from the config are ignored on
the way in and written on the way out, so that a strict load elsewhere succeeds.

Legend: D width, N tokens of the sequence, M hidden width of the MLP, P the padded one, E width of an
attention head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from xar_cli.config.schema import Config
from xar_cli.model.attention import block_causal_mask
from xar_cli.model.entities import build_grouping
from xar_cli.model.rope import ROPE_BASE, rope_table
from xar_cli.model.transformer import XAR
from xar_cli.tensor_files import State, check_state

Shapes = dict[str, tuple[int, ...]]

_BEFORE_BLOCKS = (
    ("encoder_pos_embed_learned", "pos_encoder"),
    ("decoder_pos_embed_learned", "pos_decoder"),
    ("class_emb.weight", "class_embedding.weight"),
    ("time_embed.mlp.0.weight", "time_mlp.0.weight"),
    ("time_embed.mlp.0.bias", "time_mlp.0.bias"),
    ("time_embed.mlp.2.weight", "time_mlp.2.weight"),
    ("time_embed.mlp.2.bias", "time_mlp.2.bias"),
    ("z_proj.weight", "token_proj.weight"),
    ("z_proj.bias", "token_proj.bias"),
    ("z_proj_ln.weight", "token_norm.weight"),
)
_BETWEEN_STACKS = (
    ("encoder_norm.weight", "encoder_norm.weight"),
    ("decoder_embed.weight", "decoder_proj.weight"),
    ("decoder_embed.bias", "decoder_proj.bias"),
)
_AFTER_BLOCKS = (
    ("decoder_norm.weight", "decoder_norm.weight"),
    ("pred.weight", "velocity_proj.weight"),
    ("pred.bias", "velocity_proj.bias"),
)
_BLOCK_ATTENTION = (
    ("attn.qkv.weight", "attention.qkv.weight"),
    ("attn.qkv.bias", "attention.qkv.bias"),
    ("attn.proj.weight", "attention.proj.weight"),
    ("attn.proj.bias", "attention.proj.bias"),
)
_BLOCK_END = (
    ("mlp.fc2.bias", "mlp.fc2.bias"),
    ("ada_lin.1.weight", "modulation.weight"),
    ("ada_lin.1.bias", "modulation.bias"),
)


@dataclass(frozen=True)
class Part:
    """One published tensor, and the place in one of ours that holds the same values.

    Attributes:
        published: its published name.
        ours: name of our parameter.
        place: index into our parameter; () is the whole of it.
    """

    published: str
    ours: str
    place: tuple[slice, ...] = ()


def is_derived(name: str) -> bool:
    """Whether a published name is a buffer that follows from the config: `mask` and `*.attn.rope.*`."""
    return name == "mask" or ".attn.rope." in name


@lru_cache(maxsize=8)
def parts(config: Config) -> tuple[Part, ...]:
    """Every published parameter of a config, in the order of the published files."""
    hidden = config.model.mlp_hidden
    padded = our_shapes(config)["encoder.0.mlp.fc2.weight"][1]
    gate, value = slice(0, hidden), slice(padded, padded + hidden)

    def stack(name: str) -> list[Part]:
        found = []
        for index in range(config.model.depth):
            theirs, ours = f"{name}_blocks.{index}.", f"{name}.{index}."
            found += [Part(theirs + a, ours + b) for a, b in _BLOCK_ATTENTION]
            for kind in ("weight", "bias"):
                found.append(Part(f"{theirs}mlp.fc1_g.{kind}", f"{ours}mlp.fc1.{kind}", (gate,)))
            for kind in ("weight", "bias"):
                found.append(Part(f"{theirs}mlp.fc1_x.{kind}", f"{ours}mlp.fc1.{kind}", (value,)))
            found.append(Part(f"{theirs}mlp.fc2.weight", f"{ours}mlp.fc2.weight", (slice(None), gate)))
            found += [Part(theirs + a, ours + b) for a, b in _BLOCK_END]
        return found

    return (
        *(Part(*pair) for pair in _BEFORE_BLOCKS),
        *stack("encoder"),
        *(Part(*pair) for pair in _BETWEEN_STACKS),
        *stack("decoder"),
        *(Part(*pair) for pair in _AFTER_BLOCKS),
    )


@lru_cache(maxsize=8)
def our_shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of XAR's state dict; the network is built without memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in XAR(config).state_dict().items()}


@lru_cache(maxsize=8)
def published_shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the published parameters of a config, without the derived buffers."""
    shapes = our_shapes(config)
    return {
        part.published: tuple(torch.empty(shapes[part.ours], device="meta")[part.place].shape) for part in parts(config)
    }


def from_published(state: Mapping[str, Tensor], config: Config, what: str = "The state dict") -> State:
    """Published weights under our names, bit for bit; the padding is zero.

    Args:
        state: published names; derived buffers in it are ignored.
        config: the recipe of the network.
        what: names the state in an error.

    Returns:
        a state dict for XAR(config), in the dtypes of `state`; most tensors are those of `state`, not copies.

    Raises:
        UserError: a parameter is missing, unknown or of another shape.
    """
    check_published(state, config, what)
    ours: State = {}
    for part in parts(config):
        source = state[part.published]
        if not part.place:
            ours[part.ours] = source
            continue
        if part.ours not in ours:
            ours[part.ours] = torch.zeros(our_shapes(config)[part.ours], dtype=source.dtype, device=source.device)
        ours[part.ours][part.place] = source
    return ours


def check_published(state: Mapping[str, Tensor], config: Config, what: str) -> None:
    """Raise a UserError unless `state` is, derived buffers aside, the published layout of a config."""
    parameters = {name: tensor for name, tensor in state.items() if not is_derived(name)}
    check_state(parameters, published_shapes(config), what, _NEXT_STEP)


def check_ours(state: Mapping[str, Tensor], config: Config, what: str) -> None:
    """Raise a UserError unless `state` has exactly the names and shapes of XAR(config)."""
    check_state(state, our_shapes(config), what, _NEXT_STEP)


_NEXT_STEP = "Give the recipe that these weights were trained with; `xar weights info FILE` tells what fits."


def to_published(state: Mapping[str, Tensor], config: Config) -> State:
    """Our weights in the published layout, bit for bit, with the derived buffers, in the published order.

    Args:
        state: a state dict of XAR(config).
        config: the recipe of the network.

    Raises:
        UserError: a parameter is missing, unknown or of another shape.
    """
    check_ours(state, config, "The state dict")
    published = {part.published: state[part.ours][part.place].contiguous() for part in parts(config)}
    buffers = derived_buffers(config)
    ordered: State = {}
    for name, tensor in published.items():
        ordered[name] = tensor
        if name == "decoder_pos_embed_learned":
            ordered["mask"] = buffers["mask"]
        if name.endswith(".attn.proj.bias"):
            prefix = name.removesuffix("proj.bias")
            ordered.update({prefix + key: buffers[key].clone() for key in _ROPE_BUFFERS})
    return ordered


_ROPE_BUFFERS = ("rope.freqs", "rope.freqs_cos", "rope.freqs_sin")


def derived_buffers(config: Config) -> State:
    """The buffers of the published layout: `mask`, and `rope.*` of every block (the same in all).

    Names, shapes and the rotation are known. Inferred and not verified against a published file: that the
    mask is float32 and additive (0 where a token may look, minus infinity elsewhere), that `freqs` are the
    frequencies of one axis, and that the tables repeat every angle for both dims of its pair, row dims first.

    Returns:
        mask (1, 1, N, N), rope.freqs (E/4,), rope.freqs_cos and rope.freqs_sin (N, E), float32.
    """
    grouping = build_grouping(config.entity, config.grid)
    head_dim = config.model.head_dim
    visible = block_causal_mask(grouping.lengths)
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -math.inf)
    cos, sin = rope_table(grouping.coordinates, head_dim).repeat_interleave(2, dim=-1)
    pairs = torch.arange(head_dim // 4, dtype=torch.float32)
    return {
        "mask": mask[None, None],
        "rope.freqs": ROPE_BASE ** (-2 * pairs / (head_dim / 2)),
        "rope.freqs_cos": cos,
        "rope.freqs_sin": sin,
    }
