"""Dropout, with masks that are drawn all at once on a CPU.

Torch's fused kernels draw them inside the kernel, which is best on a GPU; on a CPU compiled code would draw number by
number, and take longer for it than for the matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, probability: float, training: bool = True) -> Tensor:
    """Zero each value of x with a probability in [0, 1), and scale the others to keep the mean; x if not training."""
    if not training or probability == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability)
    return x * keep * (1 / (1 - probability))


def attention_with_dropout(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, probability: float
) -> Tensor:
    """Scaled dot-product attention with dropout on its weights; `F.scaled_dot_product_attention` wherever that is best.

    Args:
        queries: (B, H, N, E).
        keys, values: (B, H, S, E).
        mask: (N, S) bool, True where a query may look; None lets all see all.
        probability: of dropout, in [0, 1).

    Returns:
        (B, H, N, E).
    """
    if probability == 0 or queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=probability)
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5  # (B, H, N, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return dropout(weights, probability) @ values
