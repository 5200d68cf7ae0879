"""Noise and labels of generated images, each addressed by (seed, image index) alone.

So image i is the same image in any batch, on any number of processes, after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LABEL_STREAM, _NOISE_STREAM = 1, 2  # keep the two uses of one seed apart


def _generator_seed(*address: int) -> int:
    """A 63-bit seed from a tuple of numbers.

    Torch's CPU generator takes its low 32 bits alone. Streams of different tuples are unrelated but for rare chance: of
    the 200,000 of 50,000 images with four entities about five pairs coincide.
    """
    return int(np.random.SeedSequence(address).generate_state(1, np.uint64)[0] >> np.uint64(1))


def balanced_label(seed: int, index: int, classes: Sequence[int]) -> int:
    """Label of image `index`: every run of len(classes) images holds each class once, in an order of its own.

    Any count is as balanced as it can be, and the files are in a fixed shuffled order.
    """
    block, place = divmod(index, len(classes))
    order = np.random.default_rng((_LABEL_STREAM, seed, block)).permutation(len(classes))
    return classes[order[place]]


class AddressedNoise:
    """Gaussian noise of a batch of images, drawn on the CPU and the same for any device.

    Args:
        seed: of the whole set of samples.
        indices: image index of every row of the batch.
        channels: C, values per token.
        device: where the noise is wanted.
    """

    def __init__(self, seed: int, indices: Sequence[int], channels: int, device: torch.device) -> None:
        self._seed, self._indices, self._channels, self._device = seed, list(indices), channels, device

    def draw(self, entity: int, length: int, draws: int) -> Tensor:
        """(draws, B, length, C) float32 standard normal noise of one entity; row 0 is its initial noise."""
        rows = [self._draw_image(index, entity, length, draws) for index in self._indices]
        noise = torch.stack(rows, dim=1)
        if self._device.type == "cuda":  # from pinned memory: the host need not wait until the device takes it
            noise = noise.pin_memory()
        return noise.to(self._device, non_blocking=True)

    def _draw_image(self, index: int, entity: int, length: int, draws: int) -> Tensor:
        """(draws, length, C); draw after draw, so that the first ones do not depend on how many follow."""
        generator = torch.Generator().manual_seed(_generator_seed(_NOISE_STREAM, self._seed, index, entity))
        return torch.stack([torch.randn(length, self._channels, generator=generator) for _ in range(draws)])
