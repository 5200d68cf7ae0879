"""The training objective: noisy entities in, mean squared error of the velocity out (paper, equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xar_cli.config.schema import Config
from xar_cli.flow.interpolant import noisy_latent, target_velocity
from xar_cli.model.entities import Grouping
from xar_cli.precision import autocast
from xar_cli.tokenizer.codec import sample_latents
from xar_cli.train.draws import StepDraws


def batch_loss(
    model: nn.Module, config: Config, grouping: Grouping, moments: Tensor, labels: Tensor, draws: StepDraws
) -> Tensor:
    """Squared error of the velocity, per image and token: (B, N) float32, in the recipe's precision.

    Args:
        model: XAR or a wrapper of it.
        config: the recipe.
        grouping: the model's entities.
        moments: (B, 2C, H, W) of the tokenizer.
        labels: (B,) classes.
        draws: everything random, for these B images.
    """
    latents = sample_latents(moments.float(), draws.posterior_noise, config.tokenizer.latent_scale)
    unlabelled = torch.full_like(labels, config.null_label)
    labels = torch.where(draws.drop_label, unlabelled, labels) if config.data.num_classes else unlabelled
    with autocast(config.train.precision, moments.device):
        x, clean = grouping.to_tokens(latents), config.train.context == "clean"
        return velocity_loss(model, x, draws.noise, draws.t, labels, grouping.lengths, clean)


def velocity_loss(
    model: nn.Module,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    labels: Tensor,
    lengths: tuple[int, ...],
    clean_context: bool = False,
) -> Tensor:
    """Squared error of the predicted velocity, per image and token: (B, N) float32.

    Args:
        model: XAR or a wrapper of it.
        x: (B, N, C) clean tokens in entity order.
        noise: (B, N, C) standard normal.
        t: (B, K) timestep of every entity.
        labels: (B,), the null label where a label was dropped.
        lengths: tokens of each entity.
        clean_context: earlier entities are context as they are in the data (teacher forcing); otherwise in their noised
            form (Noisy Context Learning).
    """
    x_t = noisy_latent(x, noise, per_token(t, lengths)[..., None])
    velocity = model(x_t, t, labels, context=x if clean_context else None)
    return (velocity.float() - target_velocity(x, noise)).square().mean(-1)


def per_token(t: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, K) -> (B, N), each entity's value for all of its tokens; sizes stay on the host, so no device waits."""
    if len(set(lengths)) == 1:
        return t.repeat_interleave(lengths[0], dim=1)
    return torch.cat([t[:, j : j + 1].expand(-1, length) for j, length in enumerate(lengths)], dim=1)
