"""The arithmetic that a `precision` stands for, in one place for all stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


@contextmanager
def float32_arithmetic(precision: str) -> Iterator[None]:
    """What convolutions and products of float32 do on CUDA: TF32 for `tf32`, true float32 for all else.

    Torch lets convolutions use TF32 unless it is told otherwise, which shifts the features of an evaluation and the
    moments of a tokenizer in the third digit.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
