"""No learned tokenizer: `patch` x `patch` pixels become the channels of one token, and back, without loss.

Its moments have the constant log-variance -30: the sample is the pixel itself (off by 3e-7 times the noise).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_cli.tokenizer.protocol import Half

LOGVAR = -30.0


class Pixels:
    """The folding of pixels (a `Tokenizer`); it has no weights.

    Args:
        patch: side of the square of pixels that makes one token.
        image_channels: 1 for grey images, 3 for RGB.
    """

    kind = "pixels"

    def __init__(self, patch: int, image_channels: int) -> None:
        self.stride = patch
        self.image_channels = image_channels
        self.latent_channels = image_channels * patch * patch
        self.identity = f"pixels/p{patch}"

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, channels, height, width) in [-1, 1] -> moments (B, 2C, H, W): the pixels, then -30.

        Channel `c * patch^2 + row * patch + column` of a token is channel c of that pixel of its patch.
        """
        mean = F.pixel_unshuffle(images, self.stride)
        return torch.cat([mean, torch.full_like(mean, LOGVAR)], dim=1)

    def decode(self, raw_latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, H, W) -> images (B, channels, height, width)."""
        return F.pixel_shuffle(raw_latents, self.stride)

    def expect(self, half: Half, pixels: int) -> None:
        """There is nothing to get ready."""
