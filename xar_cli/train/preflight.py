"""What is tried before the first step: everything that would otherwise fail after hours.

Files and folders are checked in run.py; here are the device, the batch and one forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from xar_cli.config.schema import Config
from xar_cli.device_memory import is_out_of_memory
from xar_cli.distributed import Ranks, ranks_of_machine
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.run_dir import format_bytes
from xar_cli.train.cost import batch_that_fits, device_bytes
from xar_cli.train.plan import AUTO, TrainPlan, memory_warning
from xar_cli.train.probe import find_batch, missing_optimizer_bytes, share_of_device
from xar_cli.train.state import TrainState
from xar_cli.train.step import Batches, backward

PROBED_DEVICES = ("cuda",)  # a CPU has no limit of its own to run into: the machine would swap or kill


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
    fits = -ranks.largest(-estimated_batch(config, ranks.device, ranks.world_size, ranks_of_machine(ranks.world_size)))
    if ranks.device.type not in PROBED_DEVICES:
        log.info("Batch per rank: at most %d, by estimate (the memory of a CPU is not probed).", fits)
    return fits


def estimated_batch(config: Config, device: torch.device, world_size: int, ranks_here: int) -> int:
    """Images of one forward pass that the device's memory holds by estimate."""
    memory = memory_of_rank(device, ranks_here)
    return batch_that_fits(config, world_size, memory if device.type == "cuda" else memory // 2)


def memory_of_rank(device: torch.device, ranks_here: int) -> int:
    """Bytes that one rank can use: its GPU's, or its share of the machine's."""
    return device_bytes(device) // (1 if device.type == "cuda" else ranks_here)


def with_memory(plan: TrainPlan, ranks: Ranks) -> TrainPlan:
    """The plan, compared with the memory that is here; where it does not fit by estimate, a warning says so."""
    plan = replace(plan, device_bytes=memory_of_rank(ranks.device, ranks_of_machine(ranks.world_size)))
    warning = memory_warning(plan)
    if warning is not None and ranks.is_main:
        log.warning("%s", warning)
    return plan


def probed_batch(state: TrainState, ranks: Ranks, start: int, attempt: Callable[[int], None]) -> int:
    """The largest batch of one forward pass that the memory of every rank holds, found by trying.

    Args:
        state: of the run; it is left as it was.
        ranks: all of them call this.
        start: where to begin, the same on all ranks.
        attempt: the passes of a step's beginning with a batch, `some_passes`.

    Raises:
        UserError: not even one image fits (exit code 1).
    """
    found = find_batch(state, ranks, start, attempt, share_of_device(state, ranks) * device_bytes(ranks.device))
    if found is None:
        raise _does_not_fit(1, "")
    log.info("Batch per rank: %d, found by trying on the device (%d by estimate).", found, start)
    return found


def some_passes(state: TrainState, plan: TrainPlan, batches: Batches, ranks: Ranks) -> Tensor:
    """The first passes of a step, up to two: in the second one, gradients take their place as well. Gives the loss."""
    passes = min(2, plan.accumulation_steps)
    images = passes * plan.batch_size_per_rank * plan.world_size
    part = replace(plan, accumulation_steps=passes, global_batch_size=images)
    return backward(state, part, batches, ranks, torch.ones((), device=ranks.device), None)


def first_batch(state: TrainState, plan: TrainPlan, batches: Batches, ranks: Ranks) -> None:
    """A forward and backward pass on real data, whose gradient is thrown away; nothing of the run changes.

    Raises:
        UserError: the batch does not fit into the device's memory (exit code 1).
    """
    held = None
    try:  # the place of what the optimizer keeps from the first step on is held meanwhile
        held = torch.empty(missing_optimizer_bytes(state), dtype=torch.uint8, device=ranks.device)
        loss = some_passes(state, plan, batches, ranks)
        state.optimizer.zero_grad(set_to_none=True)
        finite = bool(torch.isfinite(loss))  # the one wait
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        chosen = ", which auto chose," if state.config.train.max_batch_per_rank == AUTO else ""
        fault = _does_not_fit(plan.batch_size_per_rank, chosen)
        if ranks.world_size > 1:  # the others may wait for this rank inside the pass until their time is up
            log.error("%s", fault)
        raise fault from None
    del held
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


def _does_not_fit(batch: int, chosen: str) -> UserError:
    smaller = f"--max-batch-per-rank {batch // 2}, " if batch > 1 else ""
    return UserError(
        f"A forward and backward pass of {batch} images{chosen} does not fit into the device's memory.",
        f"Try {smaller}--set train.activation_checkpointing=true, or --set train.parallel=fsdp on several ranks.",
        exit_code=1,
    )
