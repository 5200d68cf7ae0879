"""One optimizer step. Nothing in it waits for the device: what it measures stays there, in the window.

Legend: G global batch, A accumulation steps, B = G / (A x ranks) images of one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xar_cli.data.sharding import micro_batch
from xar_cli.distributed import Ranks
from xar_cli.train.draws import draw_step, seed_dropout
from xar_cli.train.objective import batch_loss
from xar_cli.train.parallel import gradient_norm, scale_gradients, synchronised
from xar_cli.train.plan import TrainPlan
from xar_cli.train.schedule import learning_rate
from xar_cli.train.state import TrainState
from xar_cli.train.window import Window

NORM_EPS = 1e-6  # as in torch's clip_grad_norm_

Batches = Iterator[tuple[Tensor, Tensor]]  # moments (B, 2C, H, W) and labels (B,)


def take_step(state: TrainState, plan: TrainPlan, batches: Batches, ranks: Ranks, window: Window) -> None:
    """A forward and backward passes, clip, update, average; `state.step` goes up by one.

    A step whose gradient is not finite leaves weights and optimizer as they were, on all ranks: the norm of the whole
    gradient decides, which they share.
    """
    config, optimizer = state.config, state.optimizer
    scale = state.loss_scale.scale if state.loss_scale else torch.ones((), device=ranks.device)
    window.begin_step()
    loss = backward(state, plan, batches, ranks, scale, window)

    scaled_norm = gradient_norm(state.model)
    bad = ~torch.isfinite(scaled_norm)
    grad_norm = scaled_norm / scale
    scale_gradients(state.model, (config.train.grad_clip / (grad_norm + NORM_EPS)).clamp(max=1) / scale)
    lr = learning_rate(state.step, plan.total_steps, config.train)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # the fused kernel changes nothing where it is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.averages.update()
    if state.loss_scale:
        state.loss_scale.update(bad)
    window.end_step(loss, grad_norm, bad, lr)
    state.step += 1


def backward(
    state: TrainState,
    plan: TrainPlan,
    batches: Batches,
    ranks: Ranks,
    scale: Tensor,
    window: Window | None,
) -> Tensor:
    """The forward and backward passes of a step; gradients add up and meet once. Gives this rank's mean loss."""
    config, grouping, device = state.config, state.model.grouping, ranks.device
    draws = draw_step(config, grouping, state.step, device)
    total = torch.zeros((), device=device)
    for micro_step in range(plan.accumulation_steps):
        moments, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        rows = micro_batch(plan.global_batch_size, ranks.rank, ranks.world_size, micro_step, plan.accumulation_steps)
        mine = draws.rows(rows)
        seed_dropout(config.train.seed, state.step, micro_step, ranks.rank)
        with synchronised(state.wrapped, last=micro_step == plan.accumulation_steps - 1):
            losses = batch_loss(state.wrapped, config, grouping, moments, labels, mine)  # (B, N)
            loss = losses.mean() / plan.accumulation_steps
            (loss * scale).backward()
        total += loss.detach()
        if window is not None:
            window.add_losses(losses, mine, rows)
    return total
