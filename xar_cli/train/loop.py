"""The training loop: one readable page from a latent cache to a finished run.

Legend: G global batch, A accumulation steps, B images of one forward pass, N tokens, C channels.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from xar_cli.checkpoint import CheckpointWriter, latest_checkpoint
from xar_cli.config.schema import Config, Section
from xar_cli.data.latents import LatentReader
from xar_cli.data.loader import LatentLoader
from xar_cli.data.sharding import SampleStream, micro_batch
from xar_cli.distributed import Ranks, process_group
from xar_cli.errors import UserError
from xar_cli.logs import MetricsWriter, log, progress
from xar_cli.precision import autocast, set_matmul_precision
from xar_cli.run_dir import RunDir
from xar_cli.tokenizer.codec import sample_latents
from xar_cli.train.compiling import compile_blocks
from xar_cli.train.draws import StepDraws, draw_mirrored, draw_step, seed_dropout
from xar_cli.train.objective import velocity_loss
from xar_cli.train.plan import TrainPlan, make_plan
from xar_cli.train.run import check_cache, check_run, cut_metrics, open_run
from xar_cli.train.schedule import learning_rate
from xar_cli.train.state import TrainState

MAX_BAD_STEPS = 20  # this many non-finite steps in a row end the run


class TrainSettings(Section):
    """What `xar train` was asked for; crosses the process border as JSON."""

    config: Config
    data: Path
    out: Path
    device: str = "auto"


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train until the recipe's last step; goes on from the newest checkpoint where there is one.

    Returns:
        What `--json` prints: run folder, steps, last loss, seconds.

    Raises:
        UserError: the cache does not fit the recipe, the folder belongs to another run, the loss stays non-finite.
    """
    with process_group(settings.device) as ranks, LatentReader(settings.data) as reader:
        config = settings.config
        check_cache(reader, config)
        plan = make_plan(config, ranks.world_size, reader.num_samples)
        run = check_run(settings.out, config, plan.disk_bytes)
        if ranks.is_main:
            open_run(run, config, settings.data, reader)
        ranks.barrier()
        state = TrainState.fresh(config, ranks.device)
        checkpoint = latest_checkpoint(run)
        if checkpoint is not None:
            state.load(checkpoint)
            log.info("Going on with '%s' at step %d of %d.", run.root, state.step, plan.total_steps)
        if ranks.is_main:
            cut_metrics(run, state.step)
        return _run_steps(state, plan, reader, run, ranks)


def dry_run_plan(config: Config, data: Path | None, out: Path, world_size: int) -> TrainPlan:
    """The plan of a run, with every check that can be made before it starts; nothing is written.

    Without a latent cache the plan is for the number of images that the recipe states, perhaps for another machine:
    this one's disk is not asked then.
    """
    if data is None:
        return make_plan(config, world_size, config.data.num_images)
    with LatentReader(data) as reader:
        check_cache(reader, config)
        plan = make_plan(config, world_size, reader.num_samples)
    check_run(out, config, plan.disk_bytes)
    return plan


def seconds_per_step(config: Config, data: Path, device: str, steps: int = 8) -> float:
    """The median time of an optimizer step on this machine, measured on a state that is thrown away."""
    with process_group(device) as ranks, LatentReader(data) as reader:
        plan = make_plan(config, ranks.world_size, reader.num_samples)
        state, window = TrainState.fresh(config, ranks.device), _Window(ranks.device)
        batches = iter(_loader(config, plan, reader, ranks, start_step=0))
        times = []
        for _ in range(steps):
            began = time.monotonic()
            _step(state, plan, batches, ranks, window)
            window.read(state.step, plan, 0.0)
            times.append(time.monotonic() - began)
        return sorted(times)[steps // 2]


def _loader(config: Config, plan: TrainPlan, reader: LatentReader, ranks: Ranks, start_step: int) -> LatentLoader:
    """The micro-batches of this rank, from a step on; mirrored with p = 0.5 where the recipe says so."""
    seed, batch = config.train.seed, plan.global_batch_size
    return LatentLoader(
        reader, SampleStream(plan.num_images, batch, seed), ranks.rank, ranks.world_size, plan.accumulation_steps,
        start_step, mirrored=(lambda step: draw_mirrored(seed, step, batch)) if config.data.mirror else None,
        pin_memory=ranks.device.type == "cuda",
    )  # fmt: skip


def _run_steps(state: TrainState, plan: TrainPlan, reader: LatentReader, run: RunDir, ranks: Ranks) -> dict[str, Any]:
    """Take the remaining steps, logging and saving as the recipe says."""
    config = state.config
    began = time.monotonic()
    set_matmul_precision(config.train.precision)
    if config.train.compile:
        compile_blocks(state.model)
    writer = CheckpointWriter(run, config.train.keep_last)
    metrics = MetricsWriter(run.metrics)
    window = _Window(ranks.device)
    last: dict[str, Any] = {}
    with (
        closing(writer), closing(metrics), _stop_signals() as stop,
        progress(plan.total_steps, "train", "step", initial=state.step, enabled=ranks.is_main) as bar,
    ):  # fmt: skip
        batches = iter(_loader(config, plan, reader, ranks, state.step))
        while state.step < plan.total_steps:
            _step(state, plan, batches, ranks, window)
            state.step += 1
            final = state.step == plan.total_steps
            if state.step % config.train.log_every == 0 or final:
                last = window.read(state.step, plan, state.step * plan.global_batch_size / plan.num_images)
                if ranks.is_main:
                    metrics.write(**last)
                bar.update(
                    state.step - bar.done, loss=f"{last['loss']:.4f}", lr=f"{last['lr']:.1e}",
                    images_per_s=f"{last['images_per_second']:.0f}",
                )  # fmt: skip
                if last["bad_steps_in_a_row"] >= MAX_BAD_STEPS:
                    raise UserError(
                        f"The loss was not finite for {last['bad_steps_in_a_row']} steps in a row, up to step {state.step}.",
                        "Go on from the last checkpoint with a lower --set train.base_lr, or --set train.precision=tf32.",
                        exit_code=1,
                    )
            if ranks.is_main and (state.step % config.train.checkpoint_every == 0 or final or stop):
                writer.save(state.step, state.groups(), {"world_size": ranks.world_size})
            if stop and not final:
                writer.wait()
                raise UserError(
                    f"Stopped by {stop[0]} after step {state.step}; a checkpoint is written.",
                    "The same command goes on from there.",
                    exit_code=128 + signal.Signals[stop[0]].value,
                )
    return {
        "run": str(run.root),
        "steps": state.step,
        "loss": last.get("loss"),
        "seconds": time.monotonic() - began,
    }


def _step(
    state: TrainState,
    plan: TrainPlan,
    batches: Iterator[tuple[Tensor, Tensor]],
    ranks: Ranks,
    window: _Window,
) -> None:
    """One optimizer step: A forward and backward passes, clip, update, average. Never waits for the device."""
    config, model, optimizer = state.config, state.model, state.optimizer
    draws = draw_step(config, model.grouping, state.step, ranks.device)
    loss_sum = torch.zeros((), device=ranks.device)
    for micro_step in range(plan.accumulation_steps):
        moments, labels = (tensor.to(ranks.device, non_blocking=True) for tensor in next(batches))
        rows = micro_batch(plan.global_batch_size, ranks.rank, ranks.world_size, micro_step, plan.accumulation_steps)
        seed_dropout(config.train.seed, state.step, micro_step, ranks.rank)
        loss = _loss(state, moments, labels, draws.rows(rows)) / plan.accumulation_steps
        loss.backward()
        loss_sum += loss.detach()

    grad_norm = clip_grad_norm_(model.parameters(), config.train.grad_clip)
    bad = ~torch.isfinite(grad_norm)
    lr = learning_rate(state.step, plan.total_steps, config.train)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # the fused kernel leaves the weights alone where it is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.averages.update()
    window.add(loss_sum, grad_norm, bad, lr)


def _loss(state: TrainState, moments: Tensor, labels: Tensor, draws: StepDraws) -> Tensor:
    """Mean loss of one forward pass; moments (B, 2C, H, W), labels (B,)."""
    config, grouping = state.config, state.model.grouping
    latents = sample_latents(moments.float(), draws.posterior_noise, config.tokenizer.latent_scale)
    labels = torch.where(draws.drop_label, config.null_label, labels)
    with autocast(config.train.precision, moments.device):
        x = grouping.to_tokens(latents)
        clean = config.train.context == "clean"
        return velocity_loss(state.model, x, draws.noise, draws.t, labels, grouping.lengths, clean).mean()


class _Window:
    """Sums of the steps since the last record, kept on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._bad = torch.zeros((), device=device)
        self._bad_in_a_row = torch.zeros((), device=device)
        self._steps = 0
        self._began = time.monotonic()

    def add(self, loss: Tensor, grad_norm: Tensor, bad: Tensor, lr: float) -> None:
        """Count one step; nothing is read from the device."""
        self._loss += torch.where(bad, 0, loss)
        self._bad += bad
        self._bad_in_a_row = (self._bad_in_a_row + 1) * bad
        self._grad_norm, self._lr = grad_norm, lr
        self._steps += 1

    def read(self, step: int, plan: TrainPlan, epoch: float) -> dict[str, Any]:
        """The record of this window, one wait for the device; the next window begins."""
        good = self._steps - int(self._bad)
        seconds = time.monotonic() - self._began
        grad_norm = float(self._grad_norm)
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": float(self._loss) / good if good else None,
            "lr": self._lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "images_per_second": self._steps * plan.global_batch_size / seconds,
            "skipped_steps": int(self._bad),
            "bad_steps_in_a_row": int(self._bad_in_a_row),
        }
        self._loss.zero_()
        self._bad.zero_()
        self._steps, self._began = 0, time.monotonic()
        return record


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that receives the name of SIGTERM or SIGINT when one arrives; a second one acts at once."""
    received: list[str] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
