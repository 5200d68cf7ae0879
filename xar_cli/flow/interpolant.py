"""The linear interpolant between data and noise, and what follows from it (paper, equations 3 to 5).

t = 0 is data, t = 1 is noise: alpha_t = 1 - t, sigma_t = t.
"""

from __future__ import annotations

from torch import Tensor


def noisy_latent(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise; t broadcasts against x."""
    return (1 - t) * x + t * noise


def target_velocity(x: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt = noise - x, what the network learns to predict."""
    return noise - x


def score(velocity: Tensor, x_t: Tensor, t: float) -> Tensor:
    """Gradient of log p_t at x_t, from the velocity: -(x_t + (1 - t) v) / t; t in (0, 1]."""
    return -(x_t + (1 - t) * velocity) / t
