"""Dropout, with masks that are computed on a CPU: from a seed and the place of a value, wherever they are needed.

Torch's fused kernels draw masks inside the kernel, which is best on a GPU. On a CPU torch draws number after number
from one generator, which takes almost half as long as the matrix products. A mask that is a function of seed and place
costs next to nothing inside a compiled kernel, and the backward pass may compute it again instead of keeping it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, probability: float, training: bool = True) -> Tensor:
    """Zero each value of x with a probability in [0, 1), and scale the others to keep the mean; x if not training.

    Drawn from torch's global generator. On a CPU, x has at most 2^31 values.
    """
    if not training or probability == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    return torch.where(keep_mask(x.shape, probability), x * (1 / (1 - probability)), 0)


def keep_mask(shape: torch.Size, probability: float) -> Tensor:
    """A bool mask of this shape, on the CPU: False with a probability in [0, 1), each place for itself.

    A place's number is scrambled by multiplications and shifts (as the finalizer of MurmurHash3 does, with constants of
    less bias), seeded twice by torch's generator; what comes out is uniform over the 32-bit integers.
    """
    seed, other_seed = torch.randint(2**31, (2, 1), dtype=torch.int32)
    bits = torch.arange(shape.numel(), dtype=torch.int32).view(shape) * 0x2C1B3C6D + seed
    bits = (bits ^ shifted(bits, 16)) * 0x7FEB352D ^ other_seed
    bits = (bits ^ shifted(bits, 15)) * 0x297A2D39
    bits = bits ^ shifted(bits, 16)
    return bits >= round(probability * 2**32) - 2**31


def shifted(bits: Tensor, places: int) -> Tensor:
    """Shift 32-bit integers to the right, filling with zeros; torch's own shift fills with the sign."""
    return (bits >> places) & ((1 << (32 - places)) - 1)
