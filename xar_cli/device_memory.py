"""A device whose memory does not suffice: how that is known, and how it is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xar_cli.errors import UserError

WORDS = ("out of memory", "alloc_failed", "can't allocate memory")  # of CUDA, of cuBLAS and cuDNN, of a CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory did not suffice; libraries have their own words for it."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)


@contextmanager
def memory_for(work: str, next_step: str) -> Iterator[None]:
    """Work whose want of memory a person can mend.

    Args:
        work: what is done, as the beginning of a sentence: "Drawing 64 images at a time".
        next_step: how to do it with less.

    Raises:
        UserError: the work does not fit into the device's memory (exit code 1).
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{work} does not fit into the device's memory.", next_step, exit_code=1) from None
