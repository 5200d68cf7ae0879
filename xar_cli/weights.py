"""Published weights in and out: the mapping between the published parameter names and ours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_cli.config.schema import Config
from xar_cli.model.transformer import HIDDEN_MULTIPLE

_RENAMED = {
    "encoder_pos_embed_learned": "pos_encoder",
    "decoder_pos_embed_learned": "pos_decoder",
    "class_emb.weight": "class_embedding.weight",
    "z_proj_ln.weight": "token_norm.weight",
}
_PREFIXES = (
    ("time_embed.mlp.", "time_mlp."),
    ("z_proj.", "token_proj."),
    ("encoder_norm.", "encoder_norm."),
    ("decoder_norm.", "decoder_norm."),
    ("decoder_embed.", "decoder_proj."),
    ("pred.", "velocity_proj."),
)


def from_published(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The published state dict under our names, the MLP merged and padded."""
    hidden = config.model.mlp_hidden
    pad = math.ceil(hidden / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE - hidden
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "mask" or ".attn.rope." in name or ".mlp.fc1_x." in name:
            continue
        if name in _RENAMED:
            ours[_RENAMED[name]] = tensor
            continue
        prefix = next((pair for pair in _PREFIXES if name.startswith(pair[0])), None)
        if prefix:
            ours[prefix[1] + name[len(prefix[0]) :]] = tensor
            continue
        stack, index, rest = name.split(".", 2)
        block = f"{stack.removesuffix('_blocks')}.{index}."
        if rest.startswith("mlp.fc1_g."):
            value = state[name.replace("fc1_g", "fc1_x")]
            padding = (0, pad) if tensor.ndim == 1 else (0, 0, 0, pad)
            ours[block + rest.replace("fc1_g", "fc1")] = torch.cat([F.pad(tensor, padding), F.pad(value, padding)])
        elif rest == "mlp.fc2.weight":
            ours[block + rest] = F.pad(tensor, (0, pad))
        else:
            ours[block + rest.replace("attn.", "attention.").replace("ada_lin.1.", "modulation.")] = tensor
    return ours
