"""xAR written plainly: straightforward eager code, the yardstick that every speed ratio is taken against.

Network, training forward and sampling loop, each operation where the formula has it: one linear layer after another,
conditions repeated for every token, keys and values grown by concatenation, a dense mask, the null branch everywhere,
autocast for bf16. Published parameter names and published entity order (cells). Nothing here is tuned, and nothing in
xar_cli may import it. `tests/parity/test_plain.py` holds it to the golden numbers.

Legend: B batch, N tokens of the call, K entities, C channels, D width, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainXAR(nn.Module):
    """The network of K cells on a square grid, under the published parameter names.

    Args:
        dim, depth, heads: width, blocks in each of the two stacks, attention heads.
        grid, cell: side of the latent grid and of one cell, in tokens.
        channels, classes: values per token; classes without the null class.
        dropout: while training.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        grid: int = 16,
        cell: int = 8,
        channels: int = 16,
        classes: int = 1000,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid, self.cell, self.null_label = grid, cell, classes
        self.num_entities, self.length = (grid // cell) ** 2, cell**2
        tokens = grid * grid
        self.class_emb = nn.Embedding(classes + 1, dim)
        self.time_embed = TimeEmbedding(dim)
        self.z_proj = nn.Linear(channels, dim)
        self.z_proj_ln = RMSNorm(dim)
        self.encoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.decoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.encoder_blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.encoder_norm = RMSNorm(dim)
        self.decoder_embed = nn.Linear(dim, dim)
        self.decoder_blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.decoder_norm = RMSNorm(dim)
        self.pred = nn.Linear(dim, channels)

        order = self.to_sequence(torch.arange(tokens).view(1, 1, grid, grid)).flatten()
        coordinates = torch.stack([order // grid, order % grid], dim=1).float()
        frequencies = 10000.0 ** (-2 * torch.arange(dim // heads // 4).float() / (dim // heads / 2))
        angles = (coordinates[:, :, None] * frequencies).flatten(1).repeat_interleave(2, dim=-1)  # (N, E)
        entity = torch.arange(tokens) // self.length
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("mask", entity[:, None] >= entity[None, :], persistent=False)

    def to_sequence(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C): cells in raster order, tokens in raster order inside a cell."""
        batch, channels, side, _ = latents.shape
        cells = side // self.cell
        tokens = latents.reshape(batch, channels, cells, self.cell, cells, self.cell)
        return tokens.permute(0, 2, 4, 3, 5, 1).reshape(batch, side * side, channels)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, C, H, W), the inverse of `to_sequence`."""
        batch, _, channels = tokens.shape
        cells = self.grid // self.cell
        latents = tokens.reshape(batch, cells, cells, self.cell, self.cell, channels)
        return latents.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, self.grid, self.grid)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        first_entity: int = 0,
        cache: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Velocity (B, N, C) of the entities from `first_entity` on, and each layer's keys and values so far.

        x_t (B, N, C) in entity order, t (B, K) for its entities, labels (B,); `cache` holds what a pass over the
        entities before them gave.
        """
        start = first_entity * self.length
        place = slice(start, start + x_t.shape[1])
        condition = self.class_emb(labels)[:, None] + self.time_embed(t)
        seen = slice(0, place.stop)
        mask = self.mask[place, seen]
        rope = (self.cos[seen], self.sin[seen])

        h = self.z_proj_ln(self.z_proj(x_t) + self.encoder_pos_embed_learned[:, place])
        kept: list[tuple[Tensor, Tensor]] = []
        for block in self.encoder_blocks:
            h, keys_values = block(h, condition, self.length, rope, mask, cache[len(kept)] if cache else None)
            kept.append(keys_values)
        h = self.decoder_embed(self.encoder_norm(h)) + self.decoder_pos_embed_learned[:, place]
        for block in self.decoder_blocks:
            h, keys_values = block(h, condition, self.length, rope, mask, cache[len(kept)] if cache else None)
            kept.append(keys_values)
        return self.pred(self.decoder_norm(h)), kept


class TimeEmbedding(nn.Module):
    """Sinusoid of floor(1000 t), then a small network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(B, K) -> (B, K, D)."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = torch.floor(t.float() * 1000)[..., None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Block(nn.Module):
    """Attention and gated MLP with adaLN."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, dropout)
        self.mlp = GatedMLP(dim, int(dim * 4 * 2 / 3), dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        h: Tensor,
        condition: Tensor,
        length: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h (B, N, D), condition (B, K, D) -> h and this layer's keys and values so far."""
        six = self.ada_lin(condition).repeat_interleave(length, dim=1)  # (B, N, 6 D)
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = six.chunk(6, dim=-1)
        update, kept = self.attn((1 + scale_attn) * rms(h) + shift_attn, rope, mask, cache)
        h = h + gate_attn * update
        h = h + gate_mlp * self.mlp((1 + scale_mlp) * rms(h) + shift_mlp)
        return h, kept


class Attention(nn.Module):
    """Multi-head attention with RoPE and a dense mask; the cache grows by concatenation and is kept unrotated."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, h: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, N, D) -> (B, N, D), and keys and values (B, H, S + N, E)."""
        batch, tokens, dim = h.shape
        q, k, v = self.qkv(h).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        cos, sin = rope
        rotated_q = rotate(q, cos[-tokens:], sin[-tokens:])
        rotated_k = rotate(k, cos, sin)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(rotated_q, rotated_k, v, attn_mask=mask, dropout_p=dropout)
        out = self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
        return F.dropout(out, self.dropout, self.training), (k, v)


class GatedMLP(nn.Module):
    """fc2(GELU(fc1_g(x)) * fc1_x(x))."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        h = F.dropout(F.gelu(self.fc1_g(h)) * self.fc1_x(h), self.dropout, self.training)
        return F.dropout(self.fc2(h), self.dropout, self.training)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms(h) * self.weight


def rms(h: Tensor) -> Tensor:
    """Root-mean-square norm in float32, cast back."""
    return (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(h)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (a, b) of x (B, H, N, E) turned to (a cos - b sin, b cos + a sin), in float32, cast back."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).type_as(x)


def training_forward(model: PlainXAR, latents: Tensor, t: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
    """The training loss: latents (B, C, H, W), t (B, K), noise (B, N, C) in entity order, labels (B,)."""
    x = model.to_sequence(latents)
    per_token = t.repeat_interleave(model.length, dim=1)[..., None]
    velocity, _ = model((1 - per_token) * x + per_token * noise, t, labels)
    return (velocity - (noise - x)).square().mean()


@torch.no_grad()
def sample(
    model: PlainXAR,
    labels: Tensor,
    initial_noise: Tensor,
    step_noise: Tensor | None,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Latents (B, C, H, W) for labels (B,), both branches for every entity.

    Args:
        initial_noise: (B, K, L, C), L tokens of an entity.
        step_noise: (B, K, n - 1, L, C) for Euler-Maruyama; None integrates the ODE by Euler steps.
        num_steps: n, network evaluations of each entity.
        guidance_scale: of the last entity.
    """
    both = torch.cat([labels, torch.full_like(labels, model.null_label)])
    context: list[tuple[Tensor, Tensor]] | None = None
    done: list[Tensor] = []
    for entity in range(model.num_entities):
        scale = guidance_scale
        if model.num_entities > 1:
            scale = 1 + (guidance_scale - 1) * entity / (model.num_entities - 1)
        x = initial_noise[:, entity].double()
        grid = np.linspace(1, 0, num_steps + 1)
        if step_noise is not None:
            grid = np.append(np.linspace(1, 0.04, num_steps), 0.0)
        for i in range(num_steps):
            t, dt = float(grid[i]), float(grid[i + 1] - grid[i])
            rows = torch.cat([x, x]).float()
            times = torch.full((len(rows), 1), t, dtype=torch.float32, device=x.device)
            if i == 0 and entity > 0:  # the previous entity comes along, clean, and its keys and values are kept
                previous = torch.cat([done[-1], done[-1]])
                times = torch.cat([torch.zeros_like(times), times], dim=1)
                out, kept = model(torch.cat([previous, rows], dim=1), times, both, entity - 1, context)
                out = out[:, model.length :]
                context = [(k[:, :, : -model.length], v[:, :, : -model.length]) for k, v in kept]
            else:
                out, _ = model(rows, times, both, entity, context)
            conditional, unconditional = out.chunk(2)
            v = (unconditional + scale * (conditional - unconditional)).double()
            if step_noise is None:
                x = x + v * dt
                continue
            drift = v + t * (x + (1 - t) * v) / t
            x = x + drift * dt
            if i < num_steps - 1:
                x = x + math.sqrt(2 * t * -dt) * step_noise[:, entity, i].double()
        done.append(x.float())
    return model.to_latents(torch.cat(done, dim=1))
