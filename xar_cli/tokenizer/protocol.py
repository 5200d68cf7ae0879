"""What every tokenizer offers."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Half = Literal["encode", "decode"]


class Tokenizer(Protocol):
    """Image <-> moments.

    Attributes:
        kind: its name in a recipe, `kl16` or `pixels`.
        stride: pixels per token along one side.
        image_channels: 1 for grey images, 3 for RGB.
        latent_channels: values C per token.
        identity: tells tokenizers with other arithmetic apart: `kl16:<sha256 of the weights>`, `pixels/p1`. Channels
            are not in it: the shapes tell them.
    """

    kind: str
    stride: int
    image_channels: int
    latent_channels: int
    identity: str

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, image_channels, height, width) in [-1, 1] -> moments (B, 2C, H, W): mean, then log-variance."""
        ...

    def decode(self, raw_latents: Tensor) -> Tensor:
        """Raw latents (B, C, H, W) -> images (B, image_channels, height, width), about [-1, 1], not clipped."""
        ...

    def expect(self, half: Half, pixels: int) -> None:
        """Get ready to encode or decode so many pixels, in whatever way pays."""
        ...
