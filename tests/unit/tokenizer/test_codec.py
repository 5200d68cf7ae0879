"""Scaling: exact on numbers worked out by hand, and lossless where it must be."""

from __future__ import annotations

import math

import torch

from xar_cli.tokenizer import Codec, sample_latents
from xar_cli.tokenizer.pixels import Pixels


def test_sample_latents_is_the_formula():
    moments = torch.tensor([3.0, 2 * math.log(0.5)]).reshape(1, 2, 1, 1)
    eps = torch.tensor([4.0]).reshape(1, 1, 1, 1)
    assert torch.allclose(sample_latents(moments, eps, 0.2325), torch.tensor(0.2325 * (3 + 0.5 * 4)))


def test_sample_latents_takes_half_precision_moments_and_answers_in_the_dtype_of_the_noise():
    moments = torch.randn(2, 8, 3, 3).half()
    latents = sample_latents(moments, torch.zeros(2, 4, 3, 3), 2.0)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, 2 * moments[:, :4].float())


def test_every_uint8_value_survives_the_way_to_latents_and_back():
    codec = Codec(Pixels(patch=2, image_channels=3), latent_scale=0.7)
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    moments = codec.moments(images)
    assert moments.shape == (1, 24, 8, 8)
    noisy = codec.latents_from_moments(moments, torch.randn(1, 12, 8, 8))
    assert torch.equal(codec.images(noisy), images)
    assert torch.equal(codec.images(noisy.double()), images)


def test_float_images_are_taken_as_they_are():
    codec = Codec(Pixels(patch=1, image_channels=1), latent_scale=1.0)
    images = torch.full((1, 1, 2, 2), 0.25)
    assert torch.equal(codec.moments(images)[:, :1], images)


def test_images_are_rounded_and_clipped():
    codec = Codec(Pixels(patch=1, image_channels=1), latent_scale=0.5)
    raw = torch.tensor([-1.2, -1.0, 2 * 99.6 / 255 - 1, 1.0, 1.7])
    images = codec.images(0.5 * raw.reshape(1, 1, 1, 5))
    assert images.dtype == torch.uint8
    assert images.flatten().tolist() == [0, 0, 100, 255, 255]
