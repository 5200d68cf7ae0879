"""What is tried before the first step: everything that would otherwise fail after hours.

Files and folders are checked in run.py; here are the device, the batch and one forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from xar_cli.config.schema import Config
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import format_bytes
from xar_cli.train.cost import batch_that_fits, device_bytes
from xar_cli.train.plan import AUTO, TrainPlan
from xar_cli.train.state import TrainState
from xar_cli.train.step import Batches, backward


def batch_limit(config: Config, ranks: Ranks, before: int | None) -> int:
    """Images of one forward pass at most: the recipe's, or by estimate where it says auto.

    Args:
        config: the recipe.
        ranks: the smallest device among them decides.
        before: what the run used until now on as many ranks; auto stays with it, so that it goes on exactly.
    """
    limit = config.train.max_batch_per_rank
    if limit != AUTO:
        return int(limit)
    if before is not None:
        return before
    memory = device_bytes(ranks.device)
    if ranks.device.type == "cpu":
        memory //= 2 * max(1, ranks.world_size)  # ranks of one machine share it, and other programs
    fits = batch_that_fits(config, ranks.world_size, memory)
    return -ranks.largest(-fits)


def first_batch(state: TrainState, plan: TrainPlan, batches: Batches, ranks: Ranks) -> None:
    """One forward and backward pass on real data, whose gradient is thrown away; nothing of the run changes.

    Raises:
        UserError: the batch does not fit into the device's memory (exit code 1).
    """
    one_pass = replace(plan, accumulation_steps=1, global_batch_size=plan.batch_size_per_rank * plan.world_size)
    try:
        loss = backward(state, one_pass, batches, ranks, torch.ones((), device=ranks.device), None)
        state.optimizer.zero_grad(set_to_none=True)
        finite = bool(torch.isfinite(loss))  # the one wait
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"A forward and backward pass of {plan.batch_size_per_rank} images does not fit into the device's memory.",
            f"Try --max-batch-per-rank {max(1, plan.batch_size_per_rank // 2)}, "
            "--set train.activation_checkpointing=true, or --set train.parallel=fsdp.",
            exit_code=1,
        ) from None
    if not finite:
        log.warning(
            "The loss of the first batch is not finite: `xar cache-latents verify` finds Inf and NaN in a cache."
        )
    if ranks.device.type == "cuda":
        log.info(
            "First batch: %s of memory used, %s estimated, %s there.",
            format_bytes(torch.cuda.max_memory_allocated(ranks.device)), format_bytes(plan.memory_bytes),
            format_bytes(device_bytes(ranks.device)),
        )  # fmt: skip


def on_all_ranks(ranks: Ranks, attempt: Callable[[], None]) -> None:
    """Try something on every rank; a UserError of any of them is raised on all."""
    fault: UserError | None = None
    try:
        attempt()
    except UserError as error:
        fault = error
    first = next((found for found in ranks.gather(fault) if found is not None), None)
    if isinstance(first, UserError):
        raise first
