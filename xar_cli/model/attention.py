"""Block-causal attention over entities, and the cache of keys and values that sampling passes in.

Legend: B batch, N tokens of this call, S tokens of the context before it, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_cli.model.dropout import dropout as drop
from xar_cli.model.rope import rotate

MIN_UNMASKED_LENGTH = 32  # entities of at least this many tokens get an unmasked call each
RUN_LENGTH = 64  # smaller ones share a masked call, up to this many tokens together
MOST_PAIRS_UNFUSED = 256 * 1024  # of a query and a key, up to which a CPU writes the scores of a head down


Slots = tuple[Tensor, Tensor]  # places in a cache for new keys and values, (B, H, N, E) each


class KVCache:
    """Keys and values of the entities that are final, for all layers; preallocated, rotated once.

    A forward pass writes the keys and values of its own tokens behind the committed ones and attends to both.
    They stay only if `commit` is called; otherwise the next pass overwrites them.

    Args:
        layers, batch, heads, tokens, head_dim: the shape; `tokens` is the longest context plus one entity.
        device, dtype: where, and in which precision, the keys and values are kept.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        tokens: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.keys = torch.empty(layers, batch, heads, tokens, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def rows(self, count: int) -> KVCache:
        """A view of the first `count` batch rows, with the same committed length."""
        view = object.__new__(KVCache)
        view.keys, view.values, view.length = self.keys[:, :count], self.values[:, :count], self.length
        return view

    def layer(self, number: int) -> LayerCache:
        """The part of one layer, as its attention needs it for one pass."""
        return LayerCache(self.keys[number], self.values[number], self.length)

    def commit(self, tokens: int) -> None:
        """Keep the `tokens` newest keys and values, which the last pass wrote."""
        self.length += tokens


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer (B, H, capacity, E), of which the first `length` tokens are committed."""

    keys: Tensor
    values: Tensor
    length: int

    def slots(self, tokens: int) -> Slots:
        """Where keys and values of so many new tokens are written, behind the committed ones: (B, H, N, E) views."""
        new = slice(self.length, self.length + tokens)
        return self.keys[:, :, new], self.values[:, :, new]

    def seen(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The committed keys and values and those of `tokens` new tokens, (B, H, S + N, E) views."""
        end = self.length + tokens
        return self.keys[:, :, :end], self.values[:, :, :end]


Attend = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], float], Tensor]


def attention_runs(lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring entities that share one call of attention: large ones stand alone, small ones are joined.

    A call computes the keys up to the end of its run, so little more than the visible area is computed: of 256 tokens
    10/16 in runs of 64, whether a run is one entity or 64 of them.
    """
    runs: list[tuple[int, ...]] = []
    for length in lengths:
        joins = runs and max(length, *runs[-1]) < MIN_UNMASKED_LENGTH and sum(runs[-1]) + length <= RUN_LENGTH
        if joins:
            runs[-1] += (length,)
        else:
            runs.append((length,))
    return tuple(runs)


def _kept(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A mask, made once for the same arguments; inside a compiled graph it is a part of the graph."""
    return make(*arguments) if torch.compiler.is_compiling() else _kept_masks(make, *arguments)


@lru_cache(maxsize=64)
def _kept_masks(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return make(*arguments)


def entity_of_token(lengths: tuple[int, ...], device: torch.device | None) -> Tensor:
    """(N,) number of the entity that each token belongs to."""
    return torch.tensor([entity for entity, length in enumerate(lengths) for _ in range(length)], device=device)


def block_causal_mask(lengths: tuple[int, ...], past: int = 0, device: torch.device | None = None) -> Tensor:
    """(N, past + N) bool, True where a token may look: its own entity, all earlier ones, the past."""
    entity = entity_of_token(lengths, device)
    return F.pad(entity[:, None] >= entity[None, :], (past, 0), value=True)


def block_causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: tuple[int, ...], dropout: float = 0.0
) -> Tensor:
    """Attention in which an entity sees itself, all earlier entities and the past.

    One call for each run of entities (`attention_runs`), over the keys up to its end: block-sparse on every device,
    with dropout too. A run of one entity needs no mask, so that fused kernels apply.

    Args:
        queries: (B, H, N, E), the tokens of len(lengths) entities.
        keys, values: (B, H, S + N, E), S tokens of the past first.
        lengths: tokens of each entity, with sum N.
        dropout: probability on the attention weights.

    Returns:
        (B, H, N, E).
    """
    past = keys.shape[2] - queries.shape[2]
    parts, start = [], 0
    for run in attention_runs(lengths):
        end = start + sum(run)
        mask = None if len(run) == 1 else _kept(block_causal_mask, run, past + start, queries.device)
        seen = slice(0, past + end)
        parts.append(
            dot_product_attention(queries[:, :, start:end], keys[:, :, seen], values[:, :, seen], mask, dropout)
        )
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def teacher_forcing_mask(lengths: tuple[int, ...], past: int = 0, device: torch.device | None = None) -> Tensor:
    """(N, past + 2 N) bool, True where a noisy token may look: the past, clean earlier entities, its own noisy one."""
    entity = entity_of_token(lengths, device)
    mask = torch.cat([entity[:, None] > entity[None, :], entity[:, None] == entity[None, :]], dim=1)
    return F.pad(mask, (past, 0), value=True)


def teacher_forcing_attention(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: tuple[int, ...], dropout: float = 0.0
) -> Tensor:
    """Attention of a batch that holds every image twice: first with clean entities, then with noisy ones.

    A clean entity sees itself and all earlier clean ones. A noisy entity sees itself and all earlier *clean* ones,
    which is what it sees in sampling; so one pass trains all entities (paper, Table 5, context "clean"). Calls are
    made as in `block_causal_attention`.

    Args:
        queries, keys, values: (2 B, H, N, E), the clean half first.
        lengths: tokens of each entity, with sum N.
        dropout: probability on the attention weights.

    Returns:
        (2 B, H, N, E).
    """
    (clean_q, noisy_q), (clean_k, noisy_k), (clean_v, noisy_v) = (x.chunk(2) for x in (queries, keys, values))
    clean = block_causal_attention(clean_q, clean_k, clean_v, lengths, dropout)
    parts, start = [], 0
    for run in attention_runs(lengths):
        own = slice(start, start + sum(run))
        alone = len(run) == 1
        seen = slice(0, own.start if alone else own.stop)  # of the clean tokens
        parts.append(
            dot_product_attention(
                noisy_q[:, :, own],
                torch.cat([clean_k[:, :, seen], noisy_k[:, :, own]], dim=2),
                torch.cat([clean_v[:, :, seen], noisy_v[:, :, own]], dim=2),
                None if alone else _kept(teacher_forcing_mask, run, start, queries.device),
                dropout,
            )
        )
        start = own.stop
    return torch.cat([clean, torch.cat(parts, dim=2)])


def dot_product_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V, by `F.scaled_dot_product_attention` unless two matrix products are faster.

    They are on a CPU, whose fused kernel reaches a fifth of what its matrix products do, and draws dropout one by one;
    unless the scores get so many that writing them down costs more, or must be kept in float32 for a backward pass.

    Args:
        queries: (B, H, N, E).
        keys, values: (B, H, S, E).
        mask: (N, S) bool, True where a query may look; None lets all see all.
        dropout: probability on the attention weights, in [0, 1).

    Returns:
        (B, H, N, E).
    """
    pairs = queries.shape[2] * keys.shape[2]
    costs_more = pairs > MOST_PAIRS_UNFUSED or (queries.requires_grad and queries.dtype == torch.float32)
    if queries.device.type != "cpu" or (costs_more and dropout == 0):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
    scores = queries * queries.shape[-1] ** -0.5 @ keys.transpose(-1, -2)  # (B, H, N, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return drop(scores.softmax(-1).to(values.dtype), dropout) @ values


class Attention(nn.Module):
    """The projections around multi-head attention: fused qkv with rotary positions, output; no q/k norm."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, qkv: Tensor, rope: Tensor, slots: Slots | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 D) -> rotated queries, rotated keys, values, (B, H, N, E) each; `rope` (2, N, E/2).

        Keys and values are written to `slots`, where some are given: inside a compiled graph without a copy.
        """
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rope), rotate(k, rope)
        if slots is None:
            return q, k, v
        return q, slots[0].copy_(k), slots[1].copy_(v)
