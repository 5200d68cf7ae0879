"""The network, the training objective and both solvers give the published system's numbers."""

from __future__ import annotations

import pytest
import torch

from xar_cli.flow import interpolant
from xar_cli.flow.guidance import guidance_scales
from xar_cli.sample.network import SamplingNetwork
from xar_cli.sample.plan import SamplingPlan
from xar_cli.sample.sampler import sample_latents
from xar_cli.train.objective import velocity_loss

TOLERANCE = 1e-5


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


class RecordedNoise:
    """Noise of a golden run, in the sampler's form."""

    def __init__(self, initial: torch.Tensor, steps: torch.Tensor | None = None) -> None:
        self.initial, self.steps = initial, steps

    def draw(self, entity: int, length: int, draws: int) -> torch.Tensor:
        rows = [self.initial[:, entity]]
        if self.steps is not None:
            rows += list(self.steps[:, entity].unbind(1))
        return torch.stack(rows)


def test_velocity_and_loss(golden, golden_model):
    x = golden_model.grouping.to_tokens(golden["train.latents"])
    noise = golden["train.noise"].flatten(1, 2)
    t = golden["train.timesteps"]
    per_token = t.repeat_interleave(64, dim=1)[..., None]
    x_t = interpolant.noisy_latent(x, noise, per_token)
    with torch.no_grad():
        velocity = golden_model(x_t, t, golden["train.labels"])
        loss = velocity_loss(golden_model, x, noise, t, golden["train.labels"], golden_model.grouping.lengths)
    assert relative_error(velocity, golden["train.velocity"]) <= TOLERANCE
    assert relative_error(loss.mean(), golden["train.loss"][0]) <= TOLERANCE


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_sampling(solver, golden, golden_model, golden_settings):
    noise = RecordedNoise(golden[f"{solver}.initial_noise"], golden.get(f"{solver}.step_noise"))
    plan = SamplingPlan(
        solver, (golden_settings["num_steps"],) * 4, tuple(guidance_scales("linear", golden_settings["cfg"], 4))
    )
    latents = sample_latents(SamplingNetwork(golden_model), golden[f"{solver}.labels"], noise, plan)
    assert relative_error(latents, golden[f"{solver}.latents"]) <= TOLERANCE
