"""What a run will be, before anything is touched: batch arithmetic, steps, learning rate, memory, disk.

Pure arithmetic on the config; opens no file and builds no tensor except on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xar_cli.config import Config, published_result
from xar_cli.errors import UserError
from xar_cli.model import XAR
from xar_cli.model.transformer import count_parameters
from xar_cli.run_dir import format_bytes
from xar_cli.train.cost import ADAM_STATES, FLOAT_BYTES, activation_bytes, state_bytes, training_flops

AUTO = "auto"
AUTO_BATCH = 64  # what a plan assumes for max_batch_per_rank: auto where no device has been asked


@dataclass(frozen=True)
class TrainPlan:
    """The numbers of a run.

    Attributes:
        parameters: of the network, without padding.
        num_images: samples in the cache.
        world_size: ranks R.
        batch_size_per_rank: images of one forward pass on one rank.
        accumulation_steps: forward passes A per optimizer step; global batch = R * A * batch_size_per_rank.
        global_batch_size: images per optimizer step.
        total_steps: optimizer steps of the whole run.
        peak_lr: learning rate after warm-up.
        warmup_steps, decay_start_step: where the schedule turns.
        memory_bytes: estimate for one rank: weights, gradients, optimizer, averages, activations.
        checkpoint_bytes: size of one checkpoint.
        disk_bytes: what the run folder needs at most: the kept checkpoints and one being written.
        flops_per_image: operations of one image's forward and backward pass.
        device_bytes: memory that one rank has here; None for a plan of another machine.
    """

    parameters: int
    num_images: int
    world_size: int
    batch_size_per_rank: int
    accumulation_steps: int
    global_batch_size: int
    total_steps: int
    peak_lr: float
    warmup_steps: int
    decay_start_step: int
    memory_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    flops_per_image: float
    device_bytes: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the device's memory suffices by estimate; None where the device is not known."""
        return None if self.device_bytes is None else self.memory_bytes <= self.device_bytes

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values, with `fits`."""
        return {**asdict(self), "fits": self.fits}


def make_plan(config: Config, world_size: int, num_images: int, batch_limit: int | None = None) -> TrainPlan:
    """Work out a run.

    Args:
        config: the recipe.
        world_size: ranks.
        num_images: samples in the cache.
        batch_limit: images of one forward pass at most; None takes the recipe's.

    Raises:
        UserError: the global batch cannot be divided over the ranks, or the cache holds less than one batch.
    """
    train = config.train
    if batch_limit is None:
        batch_limit = AUTO_BATCH if train.max_batch_per_rank == AUTO else int(train.max_batch_per_rank)
    accumulation = accumulation_steps(train.global_batch_size, world_size, batch_limit)
    if num_images < train.global_batch_size:
        raise UserError(
            f"The cache holds {num_images} images, fewer than one global batch of {train.global_batch_size}.",
            "Use a smaller batch: --set train.global_batch_size=N.",
        )
    with torch.device("meta"):
        model = XAR(config)
    stored = sum(parameter.numel() for parameter in model.parameters()) * FLOAT_BYTES
    batch = train.global_batch_size // (world_size * accumulation)
    total_steps = math.ceil(train.epochs * num_images / train.global_batch_size)
    checkpoint = stored * (1 + ADAM_STATES + len(train.ema_decays))
    kept = train.keep_last + (total_steps // train.keep_every if train.keep_every else 0)
    return TrainPlan(
        parameters=count_parameters(model),
        num_images=num_images,
        world_size=world_size,
        batch_size_per_rank=batch,
        accumulation_steps=accumulation,
        global_batch_size=train.global_batch_size,
        total_steps=total_steps,
        peak_lr=train.lr,
        warmup_steps=round(train.warmup_fraction * total_steps),
        decay_start_step=round(train.decay_start_fraction * total_steps),
        memory_bytes=state_bytes(config, model, world_size) + batch * activation_bytes(config, model),
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (kept + 1),
        flops_per_image=training_flops(config, model),
    )


def accumulation_steps(global_batch_size: int, world_size: int, max_batch_per_rank: int) -> int:
    """The fewest forward passes per optimizer step that keep a rank's batch within its limit.

    Raises:
        UserError: the ranks do not divide the global batch; the possible numbers of ranks are named.
    """
    if global_batch_size % world_size:
        possible = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        near = sorted(possible, key=lambda n: abs(n - world_size))[:4]
        raise UserError(
            f"A global batch of {global_batch_size} cannot be divided over {world_size} ranks.",
            f"Use {', '.join(map(str, sorted(near)))} ranks, or another --set train.global_batch_size=N.",
        )
    per_rank = global_batch_size // world_size
    return next(a for a in range(1, per_rank + 1) if per_rank % a == 0 and per_rank // a <= max_batch_per_rank)


def memory_warning(plan: TrainPlan) -> str | None:
    """What to do about a batch that does not fit by estimate: a sentence and a next step, or None."""
    if plan.device_bytes is None or plan.fits:
        return None
    smaller = "a lower --max-batch-per-rank, " if plan.batch_size_per_rank > 1 else ""
    return (
        f"The batch will probably not fit: about {format_bytes(plan.memory_bytes)} are needed on each rank, "
        f"{format_bytes(plan.device_bytes)} are there. Try {smaller}--set train.activation_checkpointing=true, "
        "or --set train.parallel=fsdp on several ranks."
    )


def describe_plan(config: Config, plan: TrainPlan, out: Path) -> list[tuple[str, str]]:
    """The plan as rows of a table for people."""
    made_of = f"{plan.world_size} ranks x {plan.accumulation_steps} accumulation x {plan.batch_size_per_rank} images"
    train = config.train
    kept = f"the last {train.keep_last} kept" + (f", and every {train.keep_every:,} steps" if train.keep_every else "")
    spread = "one rank" if plan.world_size == 1 else f"{train.parallel} on {plan.world_size} ranks"
    schedule = (
        f"{plan.peak_lr:g} after {plan.warmup_steps:,} steps, "
        f"falling from step {plan.decay_start_step:,} to {train.min_lr:g}"
    )
    there = "" if plan.device_bytes is None else f" of {format_bytes(plan.device_bytes)}"
    whole = plan.flops_per_image * plan.global_batch_size * plan.total_steps
    gigaflops = plan.flops_per_image / 1e9
    work = f"{gigaflops:,.0f}" if gigaflops >= 10 else f"{gigaflops:.2g}"
    published = published_result(config)
    printed = f" (published: {published.parameters:g} M)" if published is not None and published.parameters else ""
    rows = [
        ("recipe", f"{config.name}: {config.description}"),
        ("parameters", f"{plan.parameters / 1e6:.1f} M{printed}"),
        ("data", f"{config.data.dataset}, {plan.num_images:,} images of {config.data.size_text}"),
        ("entities", config.entity_text),
        ("context", "clean" if train.context == "clean" else f"noisy, {train.context} timesteps"),
        ("global batch", f"{plan.global_batch_size} = {made_of}"),
        ("steps", f"{plan.total_steps:,} ({train.epochs:g} epochs)"),
        ("learning rate", schedule),
        ("precision", train.precision + (", compiled" if train.compile else "")),
        ("parallel", spread + (", activations recomputed" if train.activation_checkpointing else "")),
        ("work", f"{work} GFLOP per image, {whole / 1e18:.3g} EFLOP in all"),
        ("memory per rank", f"about {format_bytes(plan.memory_bytes)} (estimate){there}"),
        ("checkpoint", f"{format_bytes(plan.checkpoint_bytes)} each, {kept}"),
        ("disk", f"{format_bytes(plan.disk_bytes)} at most"),
        ("written to", str(out)),
    ]
    if published is not None and published.fid:
        rows.append(("expected result", f"FID {published.fid} ({published.source})"))
    warning = memory_warning(plan)
    if warning is not None:
        rows.append(("warning", warning))
    return rows
