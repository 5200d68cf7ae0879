"""The straight path between data and noise."""

from __future__ import annotations

import torch

from xar_cli.flow.interpolant import noisy_latent, score, target_velocity


def test_ends_of_the_path_and_its_slope():
    x, noise = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(noisy_latent(x, noise, torch.tensor(0.0)), x)
    assert torch.equal(noisy_latent(x, noise, torch.tensor(1.0)), noise)
    early, late = (noisy_latent(x, noise, torch.tensor(t)) for t in (0.25, 0.75))
    torch.testing.assert_close((late - early) / 0.5, target_velocity(x, noise))


def test_score_is_minus_noise_over_t_where_the_velocity_is_true():
    x, noise, t = torch.randn(5), torch.randn(5), 0.3
    x_t = noisy_latent(x, noise, torch.tensor(t))
    torch.testing.assert_close(score(target_velocity(x, noise), x_t, t), -noise / t)
