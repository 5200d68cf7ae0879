"""XAR, the network that predicts the velocity of noisy entities (paper, section 3.3 and appendix A).

Owns the architecture and its initialisation. Knows nothing of noise schedules, solvers or training.
Legend: B batch, K entities of this call, N their tokens, C channels, D width, M hidden width of the MLP.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_cli.config.schema import Config
from xar_cli.model.attention import (
    Attend,
    Attention,
    KVCache,
    LayerCache,
    Slots,
    block_causal_attention,
    teacher_forcing_attention,
)
from xar_cli.model.dropout import dropout
from xar_cli.model.entities import build_grouping
from xar_cli.model.rope import rope_table

TIME_FREQUENCIES = 128  # the sinusoid is twice as wide
TIME_SCALE = 1000  # t in [0, 1] becomes an integer timestep 0 .. 1000
NORM_EPS = 1e-6
HIDDEN_MULTIPLE = 64  # MLP width is zero-padded to a multiple of this: unaligned rows are slow


class XAR(nn.Module):
    """Velocity of noisy tokens, given the label and every entity's timestep.

    Args:
        config: a resolved recipe; grid, entity, tokenizer channels, classes and the model section are read.
    """

    rope: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, depth, heads = config.model.dim, config.model.depth, config.model.heads
        self.dim, self.heads = dim, heads
        # Made on the CPU even when the module is built on the meta device, so they never need filling in.
        with torch.device("cpu"):
            self.grouping = build_grouping(config.entity, config.grid)
            self.register_buffer("rope", rope_table(self.grouping.coordinates, config.model.head_dim), persistent=False)
        self.null_label = config.null_label
        tokens, channels = self.grouping.num_tokens, config.latent_channels

        self.class_embedding = nn.Embedding(config.data.num_classes + 1, dim)
        self.time_mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.token_proj = nn.Linear(channels, dim)
        self.pos_encoder = nn.Parameter(torch.empty(1, tokens, dim))
        self.pos_decoder = nn.Parameter(torch.empty(1, tokens, dim))
        self.token_norm = RMSNorm(dim)

        def stack() -> nn.ModuleList:
            return nn.ModuleList(Block(dim, heads, config.model.mlp_hidden, config.model.dropout) for _ in range(depth))

        self.encoder = stack()
        self.encoder_norm = RMSNorm(dim)
        self.decoder_proj = nn.Linear(dim, dim)
        self.decoder = stack()
        self.decoder_norm = RMSNorm(dim)
        self.velocity_proj = nn.Linear(dim, channels)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, encoder stack first."""
        return [*self.encoder, *self.decoder]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        first_entity: int = 0,
        cache: KVCache | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """The velocity of the entities first_entity .. first_entity + K - 1.

        Args:
            x_t: (B, N, C) noisy tokens in entity order.
            t: (B, K) timestep of every entity, 0 is data and 1 is noise.
            labels: (B,) class labels; `null_label` for none.
            first_entity: number of the first entity in x_t.
            cache: keys and values of the entities before it; without one, x_t must begin with entity 0.
            context: (B, N, C) clean tokens that the entities of x_t see in place of each other (teacher forcing); only
                while training, with the whole sequence and no cache.

        Returns:
            (B, N, C), in the order of x_t.
        """
        attend: Attend = block_causal_attention
        if context is not None:
            x_t, t, labels = torch.cat([context, x_t]), torch.cat([torch.zeros_like(t), t]), labels.repeat(2)
            attend = teacher_forcing_attention
        lengths = self.grouping.lengths[first_entity : first_entity + t.shape[1]]
        start = self.grouping.span(first_entity).start
        place = slice(start, start + sum(lengths))
        rope = self.rope[:, place]
        condition = F.silu(self.condition(t, labels))  # (B, K, D)

        h = self.enter(x_t, place)  # (B, N, D)
        for layer, block in enumerate(self.encoder):
            h = block(h, condition, rope, lengths, cache.layer(layer) if cache else None, attend)
        h = self.cross(h, place)
        for layer, block in enumerate(self.decoder, start=len(self.encoder)):
            h = block(h, condition, rope, lengths, cache.layer(layer) if cache else None, attend)
        if context is not None:
            h = h.chunk(2)[1]
        return self.leave(h)  # (B, N, C)

    def enter(self, x_t: Tensor, place: slice) -> Tensor:
        """Noisy tokens (B, N, C) at `place` of the sequence -> the first hidden states (B, N, D)."""
        return self.token_norm(self.token_proj(x_t) + self.pos_encoder[:, place])

    def cross(self, h: Tensor, place: slice) -> Tensor:
        """From the encoder stack to the decoder stack, (B, N, D) -> (B, N, D)."""
        return self.decoder_proj(self.encoder_norm(h)) + self.pos_decoder[:, place]

    def leave(self, h: Tensor) -> Tensor:
        """Last hidden states (B, N, D) -> velocity (B, N, C)."""
        return self.velocity_proj(self.decoder_norm(h))

    def condition(self, t: Tensor, labels: Tensor) -> Tensor:
        """(B, K) timesteps and (B,) labels -> (B, K, D): class embedding plus time embedding."""
        time = self.time_mlp(timestep_sinusoid(t).to(self.class_embedding.weight.dtype))
        return self.class_embedding(labels)[:, None] + time

    def new_cache(self, batch: int, dtype: torch.dtype) -> KVCache:
        """An empty cache that holds a whole sequence for `batch` rows."""
        return KVCache(
            layers=len(self.blocks), batch=batch, heads=self.heads, tokens=self.grouping.num_tokens,
            head_dim=self.dim // self.heads, device=self.rope.device, dtype=dtype,
        )  # fmt: skip


class Block(nn.Module):
    """Attention and gated MLP, each modulated by the condition of its entity (adaLN).

    What stands between two matrix products, or between a product and attention, is a method of its own, so that
    sampling can compile these parts alone or with the products, as the device likes it.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.mlp = GatedMLP(dim, hidden, dropout)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        h: Tensor,
        condition: Tensor,
        rope: Tensor,
        lengths: tuple[int, ...],
        cache: LayerCache | None,
        attend: Attend = block_causal_attention,
    ) -> Tensor:
        """h (B, N, D), condition (B, K, D) after its SiLU -> (B, N, D); `attend` says who sees whom."""
        return self.update(h, self.modulation(condition), rope, lengths, cache, attend)

    def update(
        self,
        h: Tensor,
        modulation: Tensor,
        rope: Tensor,
        lengths: tuple[int, ...],
        cache: LayerCache | None,
        attend: Attend = block_causal_attention,
    ) -> Tensor:
        """The block with its modulation (B, K, 6 D) at hand: h (B, N, D) -> (B, N, D)."""
        tokens = h.shape[1]
        slots = None if cache is None else cache.slots(tokens)
        queries, keys, values = self.before_attention(h, modulation, rope, lengths, slots)
        if cache is not None:
            keys, values = cache.seen(tokens)
        dropout = self.attention.dropout if self.training else 0.0
        attended = attend(queries, keys, values, lengths, dropout)
        return self.after_attention(h, attended, modulation, lengths)

    def before_attention(
        self, h: Tensor, modulation: Tensor, rope: Tensor, lengths: tuple[int, ...], slots: Slots | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values, (B, H, N, E) each; keys and values lie in `slots`, if given."""
        qkv = self.attention.qkv(self.attention_input(h, modulation, lengths))
        return self.attention.split_heads(qkv, rope, slots)

    def after_attention(self, h: Tensor, attended: Tensor, modulation: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The rest of the block; `attended` (B, H, N, E) is what attention gave."""
        update = self.attention.proj(attended.transpose(1, 2).flatten(2))
        h, modulated = self.mlp_input(h, update, modulation, lengths)
        return self.add_mlp(h, self.mlp(modulated), modulation, lengths)

    def attention_input(self, h: Tensor, modulation: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """What attention's projection takes, (B, N, D)."""
        _, _, scale, _, shift, _ = modulation.chunk(6, dim=-1)
        return modulate(h, scale, shift, lengths)

    def mlp_input(
        self, h: Tensor, update: Tensor, modulation: Tensor, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Add attention's `update` (B, N, D): the new hidden states, and what the MLP takes, (B, N, D) each."""
        gate, _, _, scale, _, shift = modulation.chunk(6, dim=-1)
        h = h + gated(dropout(update, self.attention.dropout, self.training), gate, lengths)
        return h, modulate(h, scale, shift, lengths)

    def add_mlp(self, h: Tensor, update: Tensor, modulation: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Add the MLP's `update` (B, N, D) to the hidden states."""
        _, gate, _, _, _, _ = modulation.chunk(6, dim=-1)
        return h + gated(dropout(update, self.mlp.dropout, self.training), gate, lengths)


class GatedMLP(nn.Module):
    """fc2(GELU(gate) * value), where fc1 makes gate and value in one product.

    The hidden width is zero-padded to a multiple of 64. The padding is exact: a padded gate gives GELU(0) = 0,
    so padded weights have no effect, no gradient, and stay zero.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden = hidden
        padded = math.ceil(hidden / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 2 * padded)  # rows: gate, its padding, value, its padding
        self.fc2 = nn.Linear(padded, dim)

    def forward(self, h: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self.product(self.fc1(h)))

    def product(self, hidden: Tensor) -> Tensor:
        """GELU(gate) * value, of both side by side: (B, N, 2 M) -> (B, N, M)."""
        gate, value = hidden.chunk(2, dim=-1)
        return dropout(F.gelu(gate) * value, self.dropout, self.training)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight; the norm is taken in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(h) * self.weight


def rms_norm(h: Tensor) -> Tensor:
    """h / sqrt(mean(h^2) + 1e-6) over the last dim, in float32, cast back."""
    wide = h.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).type_as(h)


def modulate(h: Tensor, scale: Tensor, shift: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(1 + scale) * rms_norm(h) + shift; h (B, N, D), scale and shift (B, K, D), one vector per entity."""
    if _uniform(lengths):  # broadcast over each entity's tokens: nothing is copied per token
        entities = rms_norm(h).unflatten(1, (len(lengths), lengths[0]))
        return ((1 + scale[:, :, None]) * entities + shift[:, :, None]).flatten(1, 2)
    return (1 + per_token(scale, lengths)) * rms_norm(h) + per_token(shift, lengths)


def gated(h: Tensor, gate: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """gate * h; h (B, N, D), gate (B, K, D), one vector per entity."""
    if _uniform(lengths):
        return (gate[:, :, None] * h.unflatten(1, (len(lengths), lengths[0]))).flatten(1, 2)
    return per_token(gate, lengths) * h


def per_token(v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Repeat the vectors (B, K, D) of the entities for each of their tokens: (B, N, D)."""
    parts = [v[:, j : j + 1].expand(-1, length, -1) for j, length in enumerate(lengths)]
    return torch.cat(parts, dim=1)


def _uniform(lengths: tuple[int, ...]) -> bool:
    return all(length == lengths[0] for length in lengths)


def timestep_sinusoid(t: Tensor) -> Tensor:
    """(...,) t in [0, 1] -> (..., 256): [cos(a), sin(a)] with a = floor(1000 t) * 10000^(-i / 128).

    The floor is taken on float32 t * 1000; another precision changes the index on many grids.
    """
    index = torch.floor(t.float() * TIME_SCALE)
    rows = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device)
    angles = index[..., None] * torch.exp(-math.log(10000) * rows / TIME_FREQUENCIES)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@torch.no_grad()
def init_weights(model: XAR, generator: torch.Generator | None = None) -> None:
    """Fill all parameters of a freshly built model, in place.

    | parameter                                   | initial value                                     |
    |---------------------------------------------|---------------------------------------------------|
    | class embedding, both position embeddings   | normal, standard deviation 0.02                   |
    | Linear weights                              | Xavier uniform; the fused qkv as one matrix       |
    | fc1 gate and value                          | Xavier uniform, each as its own unpadded matrix   |
    | Linear biases, padding of the MLP           | 0                                                 |
    | norm weights                                | 1                                                 |
    """
    for parameter in (model.class_embedding.weight, model.pos_encoder, model.pos_decoder):
        parameter.normal_(0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            module.bias.zero_()
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1)
    for module in model.modules():
        if isinstance(module, GatedMLP):
            padded = module.fc2.in_features
            for matrix in module.fc1.weight.split(padded):
                nn.init.xavier_uniform_(matrix[: module.hidden], generator=generator)
                matrix[module.hidden :] = 0
            nn.init.xavier_uniform_(module.fc2.weight[:, : module.hidden], generator=generator)
            module.fc2.weight[:, module.hidden :] = 0


def count_parameters(model: XAR) -> int:
    """Parameters of the network, the MLP's padding left out."""
    padding = 0
    for module in model.modules():
        if isinstance(module, GatedMLP):
            extra = module.fc2.in_features - module.hidden
            padding += extra * (2 * module.fc1.in_features + 2 + module.fc2.out_features)
    return sum(parameter.numel() for parameter in model.parameters()) - padding
