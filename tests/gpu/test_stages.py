"""The other stages on a GPU: the tokenizer, the networks of evaluation, and all four stages one after the other."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.parity.test_kl16 import relative_error
from tests.seeded import GOLDEN, kl16_state
from tests.unit.evaluate.conftest import inception_files, make_images  # noqa: F401  # a fixture
from tests.unit.evaluate.test_inception import relative, weights
from xar_cli.evaluate.networks import CleanFidInception, TorchFidelityInception
from xar_cli.tokenizer.kl16 import KL16, PRECISIONS, build_on_meta

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_kl16_gives_the_golden_numbers(matmul):
    """In true float32, whatever the training's precision lets products use."""
    network = build_on_meta()
    network.load_state_dict(kl16_state(), assign=True)
    tokenizer = KL16(network.cuda().to(memory_format=torch.channels_last).eval(), "kl16:seeded")
    golden = load_file(GOLDEN / "kl16_seeded.safetensors")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        moments, decoded = tokenizer.encode(golden["image"]), tokenizer.decode(golden["latents"])
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(moments.cpu(), golden["moments"]) <= 1e-5
    assert relative_error(decoded.cpu(), golden["decoded"]) <= 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 2e-2), ("fp16", 2e-2), ("bf16", 2e-1)])
def test_compiled_kl16_gives_the_golden_numbers(precision, tolerance):
    network = build_on_meta()
    network.load_state_dict(kl16_state(), assign=True)
    network = network.to(CUDA, PRECISIONS[precision]).to(memory_format=torch.channels_last)
    tokenizer = KL16(network.eval().requires_grad_(False), "kl16:seeded", precision)
    tokenizer.compile("encode"), tokenizer.compile("decode")
    golden = load_file(GOLDEN / "kl16_seeded.safetensors")
    assert relative_error(tokenizer.encode(golden["image"]).cpu(), golden["moments"]) <= tolerance
    assert relative_error(tokenizer.decode(golden["latents"]).cpu(), golden["decoded"]) <= tolerance


@pytest.mark.parametrize("compiled", [False, True])
def test_features_are_those_of_the_cpu(inception_files, compiled):  # noqa: F811
    images = make_images(3)
    for build, file, name in (
        (TorchFidelityInception, inception_files.torch_fidelity, "pool"),
        (CleanFidInception, inception_files.clean, "pool"),
    ):
        options = {"compiled": compiled} if build is TorchFidelityInception else {}
        networks = [build(weights(file), torch.device(device), "fp32", **options) for device in ("cpu", "cuda")]
        on_cpu, on_gpu = (
            network.features(np.stack([network.prepare(image) for image in images]))[name] for network in networks
        )
        assert relative(on_gpu, on_cpu) < 1e-4


def test_quickstart(tmp_path):
    """Latent cache, training, samples and distance, by one command."""
    command = [sys.executable, "-m", "xar_cli", "quickstart", "--device", "cuda", "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["class_accuracy"] > 0.9
    assert found["frechet_distance"] < 10
