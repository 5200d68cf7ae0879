"""KL-16 computes what the published tokenizer computes, on seeded weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.seeded import GOLDEN, kl16_shapes, kl16_state
from xar_cli.tokenizer.kl16 import KL16, build_on_meta


@pytest.fixture(scope="module")
def tokenizer() -> KL16:
    network = build_on_meta()
    network.load_state_dict(kl16_state(), assign=True)
    return KL16(network.eval(), "kl16:seeded")


def relative_error(ours: torch.Tensor, golden: torch.Tensor) -> float:
    return ((ours - golden).abs().max() / golden.abs().max()).item()


def test_names_and_shapes_are_the_published_ones():
    ours = {name: list(tensor.shape) for name, tensor in build_on_meta().state_dict().items()}
    assert ours == kl16_shapes()


def test_moments_and_decoding(tokenizer):
    golden = load_file(GOLDEN / "kl16_seeded.safetensors")
    assert relative_error(tokenizer.encode(golden["image"]), golden["moments"]) <= 1e-5
    assert relative_error(tokenizer.decode(golden["latents"]), golden["decoded"]) <= 1e-5
