"""The training objective: noisy entities in, mean squared error of the velocity out (paper, equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xar_cli.flow.interpolant import noisy_latent, target_velocity


def velocity_loss(
    model: nn.Module, x: Tensor, noise: Tensor, t: Tensor, labels: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Squared error of the predicted velocity, per image and token: (B, N) float32.

    Args:
        model: XAR or a wrapper of it.
        x: (B, N, C) clean tokens in entity order.
        noise: (B, N, C) standard normal.
        t: (B, K) timestep of every entity. Earlier entities are context in their noised form.
        labels: (B,), the null label where a label was dropped.
        lengths: tokens of each entity.
    """
    sizes = torch.tensor(lengths, device=t.device)
    per_token = torch.repeat_interleave(t, sizes, dim=1, output_size=x.shape[1])[..., None]  # (B, N, 1)
    velocity = model(noisy_latent(x, noise, per_token), t, labels)
    return (velocity.float() - target_velocity(x, noise)).square().mean(-1)
