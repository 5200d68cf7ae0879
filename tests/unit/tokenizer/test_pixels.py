"""Folding pixels is a permutation, in the documented channel order."""

from __future__ import annotations

import torch

from xar_cli.tokenizer.pixels import Pixels


def test_channel_order_and_logvar():
    tokenizer = Pixels(patch=2, image_channels=1)
    image = torch.tensor([[[[0.0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]]])
    moments = tokenizer.encode(image)
    assert moments[0, :4, 0, 1].tolist() == [2, 3, 6, 7]
    assert (moments[:, 4:] == -30).all()


def test_decode_undoes_encode():
    tokenizer = Pixels(patch=4, image_channels=3)
    images = torch.randn(2, 3, 8, 8)
    mean = tokenizer.encode(images)[:, : tokenizer.latent_channels]
    assert torch.equal(tokenizer.decode(mean), images)


def test_identity_and_facts():
    tokenizer = Pixels(patch=2, image_channels=3)
    assert (tokenizer.kind, tokenizer.stride, tokenizer.latent_channels) == ("pixels", 2, 12)
    assert tokenizer.identity == "pixels/p2"
