"""The sampler on a GPU: the numbers of the CPU, CUDA graphs that change no bit, and images that no batch changes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from tests.parity.test_xar import RecordedNoise, relative_error
from tests.unit.sample.test_sampler import KINDS, plan_for, small_model
from xar_cli.flow.guidance import guidance_scales
from xar_cli.precision import autocast
from xar_cli.sample.network import SamplingNetwork, prepare_network
from xar_cli.sample.noise import AddressedNoise
from xar_cli.sample.plan import SamplingPlan
from xar_cli.sample.sampler import sample_latents

CUDA = torch.device("cuda")


def draw(network: SamplingNetwork, plan: SamplingPlan, indices, precision="fp32", seed: int = 5) -> torch.Tensor:
    """Latents of some images, on the device of the network, given on the CPU."""
    device = network.model.rope.device
    labels = torch.tensor([index % 10 for index in indices], device=device)
    with autocast(precision, device):
        return sample_latents(network, labels, AddressedNoise(seed, list(indices), 1, device), plan).cpu()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_golden_latents(solver, recorded, golden, golden_model, golden_settings):
    steps = golden.get(f"{solver}.step_noise")
    noise = RecordedNoise(golden[f"{solver}.initial_noise"].cuda(), None if steps is None else steps.cuda())
    plan = SamplingPlan(
        solver, (golden_settings["num_steps"],) * 4, tuple(guidance_scales("linear", golden_settings["cfg"], 4))
    )
    network = prepare_network(golden_model.cuda(), "fp32", recorded=recorded)
    for _ in range(2):  # the second time all passes are recorded
        latents = sample_latents(network, golden[f"{solver}.labels"].cuda(), noise, plan)
        assert relative_error(latents.cpu(), golden[f"{solver}.latents"]) <= 1e-5


@pytest.mark.parametrize("entity", KINDS)
def test_images_are_those_of_the_cpu(entity):
    plan = plan_for(small_model(entity), interval=(0.1, 0.8))
    network = prepare_network(small_model(entity).cuda(), "fp32")
    alone = SamplingNetwork(small_model(entity))
    for indices in ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)):
        torch.testing.assert_close(draw(network, plan, indices), draw(alone, plan, indices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_graphs_change_no_bit(precision, compiled):
    """Neither over batches of other labels and noise, nor without guidance in between, nor for a smaller last batch."""
    plan = plan_for(small_model(dim=128), num_steps=(6, 6, 6, 6))
    unguided = dataclasses.replace(plan, guidance=(1.0,) * 4)
    recorded = prepare_network(small_model(dim=128).cuda(), precision, compiled)
    without = prepare_network(small_model(dim=128).cuda(), precision, compiled, recorded=False)
    for indices, how in (((0, 1, 2), unguided), ((0, 1, 2), plan), ((3, 4, 5), plan), ((6, 7, 8), plan), ((9,), plan)):
        found, expected = draw(recorded, how, indices, precision), draw(without, how, indices, precision)
        assert torch.isfinite(found).all()
        assert torch.equal(found, expected)


GROWING = """
from tests.gpu.test_sampling import *
network = prepare_network(small_model(dim=128).cuda(), "bf16")
plan = plan_for(network.model)
for how in (dataclasses.replace(plan, guidance=(1.0,) * 4), plan, plan):
    assert torch.isfinite(draw(network, how, (0, 1, 2), "bf16")).all()
"""


def test_a_larger_batch_is_recorded_anew():
    """In a process of its own, whose first graphs are those that the larger batch makes useless."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_image_i_is_image_i_in_any_batch():
    network = prepare_network(small_model(dim=128).cuda(), "fp32")
    plan = plan_for(network.model, num_steps=(6, 6, 6, 6))
    whole = draw(network, plan, range(8))
    torch.testing.assert_close(draw(network, plan, (2, 6)), whole[[2, 6]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draw(network, plan, range(7, -1, -1)), whole.flip(0), rtol=1e-4, atol=1e-4)


def test_a_batch_is_queued_without_waiting():
    """Once its passes are recorded, drawing a batch never makes the host wait for the device."""
    network = prepare_network(small_model(dim=128).cuda(), "bf16")
    plan, labels = plan_for(network.model), torch.tensor([1, 2, 3]).cuda()
    noise = AddressedNoise(0, [0, 1, 2], 1, CUDA)
    with autocast("bf16", CUDA):
        for _ in range(2):
            sample_latents(network, labels, noise, plan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample_latents(network, labels, noise, plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
