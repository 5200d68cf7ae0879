"""The arithmetic that a recipe's `precision` stands for, in one place for training and sampling."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass: autocast for bf16 and fp16, nothing for fp32 and tf32."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def set_matmul_precision(precision: str) -> None:
    """Let float32 matrix products use TF32 where the recipe says tf32, and full float32 everywhere else."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
