"""Micro-batches of latents for training, read ahead by threads.

Joins the order (sharding.py) with the reader (latents.py) and hands out torch tensors; what is drawn at
random, flips included, is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from xar_cli.data.latents import LatentReader
from xar_cli.data.sharding import SampleStream, micro_batch


class LatentLoader:
    """Iterates without end over the micro-batches of one rank, from a given step on.

    Args:
        reader: the cache.
        stream: the order of samples; carries the global batch size.
        rank, world_size: which share of every step this process takes.
        accumulation_steps: micro-batches A that make a step.
        start_step: the first step to hand out.
        mirrored: gives the flip of every sample of a step, bool (global_batch_size,); None never flips.
        threads: readers at work; reading releases the GIL.
        prefetch: micro-batches held ready.
        pin_memory: put the tensors where copies to a CUDA device need not wait.

    Yields:
        moments (B, 2C, H, W) in the stored dtype and labels int64 (B,), B = G / (world_size * A); the A
        micro-batches of a step one after another, then the next step.

    Raises:
        ValueError: the global batch does not divide over ranks and micro-steps.
    """

    def __init__(
        self,
        reader: LatentReader,
        stream: SampleStream,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        start_step: int = 0,
        mirrored: Callable[[int], np.ndarray] | None = None,
        threads: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.reader, self.stream, self.start_step, self.mirrored = reader, stream, start_step, mirrored
        self.threads, self.prefetch, self.pin_memory = threads, prefetch, pin_memory
        self.parts = [
            micro_batch(stream.global_batch_size, rank, world_size, micro_step, accumulation_steps)
            for micro_step in range(accumulation_steps)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches from `start_step` on; closing the iterator ends its threads."""
        ready: deque[Future[tuple[Tensor, Tensor]]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="latents") as pool:
            try:
                for indices, mirrored in self._addresses():
                    ready.append(pool.submit(self._read, indices, mirrored))
                    if len(ready) > self.prefetch:
                        yield ready.popleft().result()
            finally:
                for future in ready:
                    future.cancel()

    def _addresses(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        step = self.start_step
        while True:
            indices = self.stream.indices(step)
            mirrored = self.mirrored(step) if self.mirrored else None
            for part in self.parts:
                yield indices[part], None if mirrored is None else mirrored[part]
            step += 1

    def _read(self, indices: np.ndarray, mirrored: np.ndarray | None) -> tuple[Tensor, Tensor]:
        moments, labels = (torch.from_numpy(array) for array in self.reader.read(indices, mirrored))
        return (moments.pin_memory(), labels.pin_memory()) if self.pin_memory else (moments, labels)
