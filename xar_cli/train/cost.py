"""What training costs: floating-point operations, memory, and the peak speed of known devices.

Counted from shapes; a multiply-add is two operations. Legend: N tokens, K entities, D width, M hidden width.
"""

from __future__ import annotations

import os
import re

import torch

from xar_cli.config.schema import Config
from xar_cli.model import XAR

FLOAT_BYTES = 4
ADAM_STATES = 2
SHARE_OF_MEMORY = 0.85  # what a batch chosen by estimate may fill

# Dense peak of matrix products in bf16, in operations per second, from the makers' data sheets; by whole words of the
# device's name, the first that is found.
PEAK_BF16 = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "H800": 989e12,
    "B200": 2250e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def training_flops(config: Config, model: XAR) -> float:
    """Operations of one image's forward and backward pass (three forward passes), block-causal attention."""
    dim, hidden, lengths = config.model.dim, config.model.mlp_hidden, model.grouping.lengths
    tokens, blocks = model.grouping.num_tokens, len(model.blocks)
    matrices = tokens * (4 * dim * dim + 3 * dim * hidden)  # qkv and projection; fc1 (gate and value) and fc2
    modulation = len(lengths) * 6 * dim * dim
    visible = sum(length * end for length, end in zip(lengths, model.grouping.ends, strict=True))
    attention = 2 * visible * dim  # scores, and the sum of values
    enter, cross, leave = (
        tokens * config.latent_channels * dim,
        tokens * dim * dim,
        tokens * config.latent_channels * dim,
    )
    return 3 * 2 * (_copies(config) * (blocks * (matrices + modulation + attention) + enter + cross) + leave)


def _copies(config: Config) -> int:
    """How often the blocks see an image: twice with clean context (`teacher_forcing_attention`)."""
    return 2 if config.train.context == "clean" else 1


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak for a recipe's precision, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((value for known, value in PEAK_BF16.items() if re.search(rf"\b{known}\b", name)), None)
    if peak is None or precision == "fp32" or "Laptop" in name:
        return None
    return peak / 2 if precision == "tf32" else peak


def activation_bytes(config: Config, model: XAR) -> int:
    """Estimate of what one image keeps for the backward pass.

    Per token and block, in values of the compute dtype: the residual stream twice (in float32), the two modulated
    inputs, q, k, v as they are projected and as attention takes them, the attention output and both projections behind
    it, and three hidden rows of the MLP; with dropout a byte for each of its masks. Per entity and block: its
    modulation. With activation checkpointing: the input of every block, and one block in full. With the state beside
    it, xAR-B comes to 12.3 GiB for 64 images and 39.8 for 256; 12.4 and 40.3 were measured on a GPU, compiled
    (docs/performance.md).

    Attention counts as a fused kernel, which keeps no weights. On a CPU they are kept, by head over all pairs of tokens
    (`dot_product_attention`), and are not counted here.
    """
    size = 2 if config.train.precision in ("bf16", "fp16") else FLOAT_BYTES
    dim, hidden = config.model.dim, config.model.mlp_hidden
    block_input = dim * FLOAT_BYTES
    masks = 2 * dim + hidden if config.model.dropout else 0
    block = 2 * block_input + (10 * dim + 3 * hidden) * size + masks
    tokens, modulation = model.grouping.num_tokens, model.grouping.num_entities * 6 * dim * size
    whole, count = tokens * block + modulation, len(model.blocks)
    kept = count * tokens * block_input + whole if config.train.activation_checkpointing else count * whole
    return _copies(config) * kept


def state_bytes(config: Config, model: XAR, world_size: int) -> int:
    """What weights, gradients, optimizer and averages take on one rank."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    whole = parameters * FLOAT_BYTES * (2 + ADAM_STATES + len(config.train.ema_decays))
    return whole // world_size if config.train.parallel == "fsdp" else whole


def device_bytes(device: torch.device) -> int:
    """Memory of the device; on a CPU, that of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def batch_that_fits(config: Config, world_size: int, memory: int) -> int:
    """The largest batch of one forward pass that `memory` bytes hold by estimate, at least 1."""
    with torch.device("meta"):
        model = XAR(config)
    free = SHARE_OF_MEMORY * memory - state_bytes(config, model, world_size)
    return max(1, int(free // activation_bytes(config, model)))
