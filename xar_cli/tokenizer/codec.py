"""The one home of scaling: uint8 images <-> moments, moments <-> latents of unit variance.

A raw latent is what a tokenizer encodes and decodes; a latent is raw latent times `latent_scale`, what the
generator works on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xar_cli.tokenizer.protocol import Tokenizer


def sample_latents(moments: Tensor, eps: Tensor, latent_scale: float) -> Tensor:
    """latent_scale * (mean + exp(0.5 * logvar) * eps).

    Args:
        moments: (B, 2C, H, W), mean and log-variance.
        eps: (B, C, H, W), standard normal; zeros give the scaled mean.
        latent_scale: factor that brings latents to unit variance.

    Returns:
        latents (B, C, H, W), in the dtype of eps.
    """
    mean, logvar = moments.to(eps.dtype).chunk(2, dim=1)
    return latent_scale * (mean + torch.exp(0.5 * logvar) * eps)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 -> float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """round(clip((x + 1) / 2 * 255, 0, 255)) of images in [-1, 1]; the inverse of `to_unit_range`."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


class Codec:
    """Images to latents and back, through a tokenizer and its latent scale.

    Args:
        tokenizer: what turns images into moments and raw latents into images.
        latent_scale: factor that brings latents to unit variance.
    """

    def __init__(self, tokenizer: Tokenizer, latent_scale: float) -> None:
        self.tokenizer = tokenizer
        self.latent_scale = latent_scale

    def moments(self, images: Tensor) -> Tensor:
        """Images (B, channels, height, width), uint8 or float in [-1, 1] -> moments (B, 2C, H, W)."""
        return self.tokenizer.encode(to_unit_range(images) if images.dtype == torch.uint8 else images)

    def latents_from_moments(self, moments: Tensor, eps: Tensor) -> Tensor:
        """Latents (B, C, H, W) drawn from moments (B, 2C, H, W) with the noise eps (B, C, H, W)."""
        return sample_latents(moments, eps, self.latent_scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> float32 images (B, channels, height, width), about [-1, 1], not clipped."""
        return self.tokenizer.decode(latents / self.latent_scale)

    def images(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> uint8 images (B, channels, height, width)."""
        return to_uint8(self.decode(latents))
