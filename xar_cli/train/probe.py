"""The largest batch that the device's memory holds, found by trying: `max_batch_per_rank: auto` on CUDA.

The search is pure. A trial is the forward and backward passes of a step's beginning, of which nothing stays: no
gradient, no compiled code, no memory.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

from xar_cli.device_memory import is_out_of_memory
from xar_cli.distributed import Ranks
from xar_cli.train.cost import ADAM_STATES
from xar_cli.train.parallel import local_part, synchronised
from xar_cli.train.state import TrainState

SHARE_OF_DEVICE = 0.9  # what may be used at most; the rest is for fragments, previews, other programs
SHARE_BY_LINE = 0.8  # where that is not measured, but follows from smaller batches

Trial = Callable[[int], None]  # the passes of a step with this batch; raises OutOfMemoryError where it does not fit


def divisors(number: int) -> list[int]:
    """All divisors, rising: the batches that a rank's share of the global batch can be cut into."""
    return [n for n in range(1, number + 1) if number % n == 0]


def largest_that_fits(candidates: Sequence[int], start: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of some rising batches that fits, or None; by bisection, taking for granted that less fits better.

    Args:
        candidates: what may be tried.
        start: a guess; the largest candidate not above it is tried first.
        fits: tries one.
    """
    fitting, failing = -1, len(candidates)  # places: the largest known to fit, the smallest known not to
    place = max(0, bisect_right(candidates, start) - 1)
    while failing - fitting > 1:
        if fits(candidates[place]):
            fitting = place
        else:
            failing = place
        place = (fitting + failing) // 2
    return None if fitting < 0 else candidates[fitting]


def find_batch(state: TrainState, ranks: Ranks, start: int, trial: Trial, budget: float) -> int | None:
    """The largest batch per rank that fits on every rank, or None where none does; every rank calls this.

    Ranks that hold a whole model try by themselves. Sharded ones meet inside every pass, where one that runs out of
    memory would leave the others waiting: they only measure the two smallest batches and draw a line through them.

    Args:
        state: the run's; it is left as it was.
        ranks: who takes part.
        start: a guess, the same on all ranks.
        trial: the passes of a step with a batch.
        budget: bytes of the device that may be used.
    """
    candidates = divisors(state.config.train.global_batch_size // ranks.world_size)

    def measure(batch: int) -> float:
        return used_by(trial, batch, state, ranks.device)

    if is_sharded(state, ranks) and len(candidates) > 1:
        estimate = line_through(candidates[0], candidates[1], measure)
    else:
        estimate = measure

    def fits(batch: int) -> bool:
        return not ranks.largest(int(not estimate(batch) <= budget))  # what is no number does not fit

    return largest_that_fits(candidates, start, fits)


def is_sharded(state: TrainState, ranks: Ranks) -> bool:
    """Whether the ranks hold shards of one model, and so meet inside every pass."""
    return state.config.train.parallel == "fsdp" and ranks.world_size > 1


def share_of_device(state: TrainState, ranks: Ranks) -> float:
    """The part of a device's memory that a batch which `find_batch` finds may use."""
    return SHARE_BY_LINE if is_sharded(state, ranks) else SHARE_OF_DEVICE


def line_through(first: int, second: int, measure: Callable[[int], float]) -> Callable[[int], float]:
    """Bytes by batch, on the straight line through two measured batches."""
    base, more = measure(first), measure(second)
    slope = (more - base) / (second - first)
    return lambda batch: base if batch == first else base + slope * (batch - first)


def used_by(trial: Trial, batch: int, state: TrainState, device: torch.device) -> float:
    """Bytes of the device in use at the height of a trial; infinity where they do not suffice.

    The optimizer's state does not exist before the first step: its place is held meanwhile.
    """
    forget(state, device)
    held = None
    try:
        held = torch.empty(missing_optimizer_bytes(state), dtype=torch.uint8, device=device)
        with synchronised(state.wrapped, last=False):  # no rank waits for another
            trial(batch)
        used = peak_bytes(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        used = float("inf")
    del held
    forget(state, device)
    return used


def missing_optimizer_bytes(state: TrainState) -> int:
    """What the optimizer will take on this rank from the first step on."""
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    return sum(ADAM_STATES * local_part(p).nbytes for p in parameters if not state.optimizer.state.get(p))


def peak_bytes(device: torch.device) -> float:
    """Bytes of the device in use at the highest point since `forget`, by other programs too; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return float(others + torch.cuda.max_memory_reserved(device))


def forget(state: TrainState, device: torch.device) -> None:
    """Leave nothing of a trial behind: gradients, code compiled for its batch, cached memory and its statistics."""
    state.optimizer.zero_grad(set_to_none=True)
    if state.config.train.compile:
        torch._dynamo.reset()  # a second batch size would make it compile for any size, which is slower
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
