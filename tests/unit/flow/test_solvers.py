"""The solvers on equations with a known answer: order of accuracy, number of evaluations, the SDE's statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from xar_cli.flow.solvers import SOLVERS, STOCHASTIC, euler, euler_maruyama, heun, multistep

ODE_SOLVERS = sorted(set(SOLVERS) - STOCHASTIC)


def no_noise(step: int) -> torch.Tensor:
    raise AssertionError("an ODE solver asked for noise")


def error_at(solver, num_steps: int) -> float:
    """Of dx/dt = x (1 + t) from x(1) = 1 to x(0) = exp(-3/2)."""
    x = solver(lambda x, t: x * (1 + t), torch.ones(1), num_steps, no_noise)
    return abs(x.item() - math.exp(-1.5))


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("num_steps", [2, 5, 8])
def test_exactly_num_steps_evaluations_from_t_1_and_state_in_float64(name, num_steps):
    times: list[float] = []

    def velocity(x, t):
        times.append(t)
        assert x.dtype == torch.float64
        return torch.zeros_like(x, dtype=torch.float32)

    result = SOLVERS[name](velocity, torch.zeros(3), num_steps, lambda step: torch.zeros(3))
    assert len(times) == num_steps
    assert times[0] == 1
    assert all(0 <= t <= 1 for t in times)
    assert result.dtype == torch.float64


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_order_of_accuracy(name, order):
    coarse, fine = error_at(SOLVERS[name], 64), error_at(SOLVERS[name], 128)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_first_multistep_and_single_heun_evaluation_are_euler_steps():
    for solver in (multistep, heun):
        assert error_at(solver, 1) == error_at(euler, 1)


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_a_straight_path_is_followed_exactly_in_any_number_of_steps(name):
    data, noise = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for num_steps in (1, 3, 4):
        result = SOLVERS[name](lambda x, t: noise - data, noise, num_steps, no_noise)
        torch.testing.assert_close(result, data)


def test_euler_maruyama_by_hand():
    """Two steps with a constant velocity, written out from the formulas."""
    x, v, eps = 0.7, 0.3, -1.1
    for t, t_next, noisy in ((1.0, 0.04, True), (0.04, 0.0, False)):
        dt, g, s = t_next - t, 2 * t, -(x + (1 - t) * v) / t
        x = x + (v - 0.5 * g * s) * dt + (math.sqrt(g * -dt) * eps if noisy else 0.0)
    result = euler_maruyama(
        lambda x, t: torch.full_like(x, v), torch.tensor([0.7]), 2, lambda step: torch.tensor([eps])
    )
    assert result.item() == pytest.approx(x, rel=1e-6)


def test_euler_maruyama_keeps_the_distribution_of_data():
    """With the exact velocity of N(0, 0.5^2) data, noise becomes samples of it."""
    rng, sigma = torch.Generator().manual_seed(0), 0.5

    def velocity(x, t):
        variance = ((1 - t) * sigma) ** 2 + t**2
        return x * (t - (1 - t) * sigma**2) / variance

    count = 20_000
    draw = lambda step=0: torch.randn(count, generator=rng)  # noqa: E731
    result = euler_maruyama(velocity, draw(), 100, draw)
    # The last jump from t = 0.04 is a denoise: it takes away about 0.04^2 of variance, and no more.
    assert result.std().item() == pytest.approx(sigma, rel=0.03)
    assert result.mean().item() == pytest.approx(0, abs=0.02)


def test_step_noise_is_asked_for_once_a_step_but_the_last():
    asked: list[int] = []

    def step_noise(step):
        asked.append(step)
        return torch.zeros(1)

    euler_maruyama(lambda x, t: torch.zeros_like(x), torch.zeros(1), 6, step_noise)
    assert asked == list(range(5))


def test_sde_grid_ends_at_4_percent():
    times: list[float] = []
    euler_maruyama(lambda x, t: times.append(t) or x, torch.zeros(1), 5, lambda step: torch.zeros(1))
    np.testing.assert_allclose(times, [1, 0.76, 0.52, 0.28, 0.04])
