"""The plain transcription, which every speed ratio is taken against, gives the published system's numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain

TOLERANCE = 1e-5


@pytest.fixture
def plain_model(golden, golden_settings) -> plain.PlainXAR:
    model = plain.PlainXAR(golden_settings["dim"], golden_settings["depth"], golden_settings["heads"])
    state = {name.removeprefix("state."): tensor for name, tensor in golden.items() if name.startswith("state.")}
    state = {name: tensor for name, tensor in state.items() if name != "mask" and ".rope." not in name}
    model.load_state_dict(state, strict=True)
    return model.eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_training_loss(golden, plain_model):
    with torch.no_grad():
        loss = plain.training_forward(
            plain_model, golden["train.latents"], golden["train.timesteps"], golden["train.noise"].flatten(1, 2),
            golden["train.labels"],
        )  # fmt: skip
    assert relative_error(loss, golden["train.loss"][0]) <= TOLERANCE


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_sampling(solver, golden, plain_model, golden_settings):
    latents = plain.sample(
        plain_model, golden[f"{solver}.labels"], golden[f"{solver}.initial_noise"], golden.get(f"{solver}.step_noise"),
        golden_settings["num_steps"], golden_settings["cfg"],
    )  # fmt: skip
    assert relative_error(latents, golden[f"{solver}.latents"]) <= TOLERANCE
