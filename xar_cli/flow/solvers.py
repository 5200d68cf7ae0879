"""Solvers: free functions that carry the tokens of one entity from noise (t = 1) to data (t = 0).

All have one signature: `solver(velocity, x, num_steps, step_noise) -> x`.
    velocity:   (x_t, t) -> velocity, one network evaluation; t is a float in [0, 1].
    x:          noise at t = 1, any shape; integrated in float64.
    num_steps:  network evaluations n.
    step_noise: i -> standard normal noise of x's shape for step i, 0 <= i < n - 1; only the SDE asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from xar_cli.flow.interpolant import score

Velocity = Callable[[Tensor, float], Tensor]
StepNoise = Callable[[int], Tensor]
Solver = Callable[[Velocity, Tensor, int, StepNoise], Tensor]

LAST_SDE_TIME = 0.04  # the SDE ends with one plain step from here to t = 0


def euler(velocity: Velocity, x: Tensor, num_steps: int, step_noise: StepNoise | None = None) -> Tensor:
    """Probability-flow ODE, Euler steps on n equal intervals: x += v dt."""
    x = x.double()
    grid = np.linspace(1, 0, num_steps + 1)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x = x + velocity(x, float(t)).double() * float(t_next - t)
    return x


def euler_maruyama(velocity: Velocity, x: Tensor, num_steps: int, step_noise: StepNoise) -> Tensor:
    """Reverse SDE with diffusion g = 2t (SiT, equation 6), Euler-Maruyama steps; n >= 2.

    Grid: n points from 1 to 0.04, then 0. Drift d = v - g s / 2 with the score s. The first n - 1 steps add
    d dt + sqrt(g |dt|) noise; the last adds d dt alone: a deliberate denoise.
    """
    x = x.double()
    grid = np.append(np.linspace(1, LAST_SDE_TIME, num_steps), 0.0)
    for i in range(num_steps):
        t, dt = float(grid[i]), float(grid[i + 1] - grid[i])
        v = velocity(x, t).double()
        diffusion = 2 * t
        x = x + (v - 0.5 * diffusion * score(v, x, t)) * dt
        if i < num_steps - 1:
            x = x + math.sqrt(diffusion * -dt) * step_noise(i).double()
    return x


def heun(velocity: Velocity, x: Tensor, num_steps: int, step_noise: StepNoise | None = None) -> Tensor:
    """Probability-flow ODE, Heun's second-order steps: the mean of the slopes at both ends of an interval.

    n evaluations make n / 2 equal intervals; where n is odd, the last interval is one Euler step.
    """
    x = x.double()
    grid = np.linspace(1, 0, (num_steps + 1) // 2 + 1)
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        dt = float(t_next - t)
        slope = velocity(x, float(t)).double()
        if 2 * i + 2 <= num_steps:
            slope = 0.5 * (slope + velocity(x + slope * dt, float(t_next)).double())
        x = x + slope * dt
    return x


def multistep(velocity: Velocity, x: Tensor, num_steps: int, step_noise: StepNoise | None = None) -> Tensor:
    """Probability-flow ODE, second-order Adams-Bashforth: one evaluation a step, extrapolated with the one before.

    x += (3/2 v_i - 1/2 v_(i-1)) dt on n equal intervals; the first is an Euler step.
    """
    x = x.double()
    grid = np.linspace(1, 0, num_steps + 1)
    before: Tensor | None = None
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        slope = velocity(x, float(t)).double()
        x = x + (slope if before is None else 1.5 * slope - 0.5 * before) * float(t_next - t)
        before = slope
    return x


SOLVERS: dict[str, Solver] = {
    "euler_maruyama": euler_maruyama,
    "euler": euler,
    "heun": heun,
    "multistep": multistep,
}
STOCHASTIC = frozenset({"euler_maruyama"})  # the solvers that ask for step noise
