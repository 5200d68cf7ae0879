"""The training loop: one readable page from a latent cache to a finished run.

What a step is stands in step.py, what is carried from step to step in state.py, what a run folder may hold in run.py.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

from torch import Tensor

from xar_cli.checkpoint import Checkpoint, CheckpointWriter, folders_to_read, latest_checkpoint, set_aside_newer
from xar_cli.config import Config, check_new_run
from xar_cli.config.schema import Section
from xar_cli.data.latents import LatentReader
from xar_cli.data.loader import LatentLoader
from xar_cli.data.sharding import SampleStream
from xar_cli.distributed import TIMEOUT_SECONDS, Ranks, pick_device, process_group
from xar_cli.errors import UserError
from xar_cli.hub import parse_hub_name
from xar_cli.logs import Progress, log, progress, read_metrics
from xar_cli.precision import set_matmul_precision
from xar_cli.run_dir import RunDir
from xar_cli.train.cost import peak_flops
from xar_cli.train.draws import draw_mirrored, draw_step
from xar_cli.train.initial import init_from, open_start
from xar_cli.train.parallel import require_parallel
from xar_cli.train.plan import AUTO, TrainPlan, make_plan
from xar_cli.train.preflight import (
    PROBED_DEVICES,
    batch_limit,
    estimated_batch,
    first_batch,
    memory_of_rank,
    probed_batch,
    some_passes,
    with_memory,
)
from xar_cli.train.preview import Measure, Preview, check_looks, require_reference, warn_of_unused_weights
from xar_cli.train.records import Records, check_loggers, check_login
from xar_cli.train.run import (
    check_agreement,
    check_data,
    check_run,
    check_start,
    cut_records,
    only_job,
    open_run,
)
from xar_cli.train.signals import StopError, stop_signals
from xar_cli.train.state import TrainState
from xar_cli.train.status import noted_state
from xar_cli.train.step import take_step
from xar_cli.train.window import BadStep, Window

WARM_UP_STEPS = 4  # of a measurement of speed
# Beside the progress bar, each with its format.
SHOWN = {"loss": ".4f", "lr": ".1e", "grad_norm": ".2f", "images_per_second": ".0f", "mfu": ".0%"}


class TrainSettings(Section):
    """What `xar train` was asked for; crosses the process border as JSON.

    Attributes:
        config: the recipe.
        data: the latent cache.
        out: the run folder.
        device: auto, cpu, cuda or cuda:N.
        in_memory: copy the cache to memory first, once for all ranks of a machine.
        init_from: weights to start a new run from; a file, a run folder or an hf:// name.
        allow_recipe_change: go on with a run whose recipe was changed where its checkpoints still hold.
        tokenizer_weights: file of KL-16's weights, for previews and evaluations.
        reference: real images or their statistics, for evaluations.
        measure: how to evaluate.
        timeout: seconds that ranks wait for each other.
    """

    config: Config
    data: Path
    out: Path
    device: str = "auto"
    in_memory: bool = False
    init_from: str | None = None
    allow_recipe_change: bool = False
    tokenizer_weights: Path | None = None
    reference: Path | None = None
    measure: Measure = Measure()
    timeout: float = TIMEOUT_SECONDS


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train until the recipe's last step; goes on from the newest checkpoint where there is one.

    Returns:
        What `--json` prints: run folder, steps, last loss, seconds.

    Raises:
        UserError: the cache does not fit the recipe, the folder belongs to another run (or was started from other
            weights), another job trains it, none of its checkpoints is whole, the ranks differ, the loss stays
            non-finite (exit code 1), the run was stopped by a signal (128 + its number).
    """
    config, run = settings.config, RunDir(settings.out)
    with (
        process_group(settings.device, settings.timeout) as ranks,
        ranks.on_all(lambda: LatentReader(settings.data, settings.in_memory)) as reader,
        only_job(run, ranks),
    ):
        ranks.on_all(lambda: reader.check_matches(config))
        check_agreement(ranks, config, reader)
        require_parallel(config.train, ranks.world_size, ranks.device)
        ranks.on_main(lambda: check_loggers(config.train.loggers))
        ranks.on_main(lambda: check_login(config.train.loggers))
        newest = ranks.on_main(lambda: _newest(run))
        ranks.on_main(lambda: check_start(run, settings.init_from, newest is not None))
        before = _batch_before(ranks, newest)
        plan = make_plan(config, ranks.world_size, reader.num_samples, batch_limit(config, ranks, before))
        ranks.on_main(lambda: check_run(settings.out, config, plan.disk_bytes, settings.allow_recipe_change) and None)
        preview = ranks.on_all(lambda: _preview(settings, plan, reader.class_names, run, ranks))

        set_matmul_precision(config.train.precision)
        state = TrainState.fresh(config, ranks.device, ranks)
        start: dict[str, Any] | None = None
        if newest is not None:
            state.load(newest)
            _say_where(run, state, plan, newest, ranks)
        else:
            source = settings.init_from
            start = {"init_from": init_from(state, source, reader.class_names, ranks) if source is not None else None}
        if state.step < plan.total_steps:
            if config.train.max_batch_per_rank == AUTO and before is None and ranks.device.type in PROBED_DEVICES:
                plan = _probed_plan(state, plan, reader, ranks)
            plan = with_memory(plan, ranks)
            with closing(batches_from(config, plan, reader, ranks, state.step)) as batches:
                ranks.on_all(lambda: first_batch(state, plan, batches, ranks))
            ranks.on_main(lambda: open_run(run, config, settings.data, reader, plan.as_dict(), start))
        else:
            ranks.on_main(lambda: check_data(run, reader))  # nothing is left to do, and nothing to take note of
        ranks.on_main(lambda: set_aside_newer(run, state.step))
        ranks.on_main(lambda: cut_records(run, state.step))
        return _run_steps(state, plan, reader, run, ranks, preview)


def dry_run_plan(
    config: Config,
    data: Path | None,
    out: Path,
    world_size: int,
    allow_recipe_change: bool = False,
    device: str = "auto",
    ranks_here: int = 1,
    init_from: str | None = None,
    reference: Path | None = None,
    measure: Measure | None = None,
    tokenizer_weights: Path | None = None,
) -> TrainPlan:
    """The plan of a run, with every check that can be made before it starts; nothing is written.

    Without a latent cache the plan is for the number of images that the recipe states, perhaps for another machine:
    this one's disk and memory are not asked then.

    Args:
        config: the recipe.
        data: the latent cache.
        out: the run folder.
        world_size: ranks in all.
        allow_recipe_change: as for the run.
        device: as for the run.
        ranks_here: ranks of this machine; on a CPU they share its memory.
        init_from, reference, measure, tokenizer_weights: as for the run; an hf:// name is not fetched.
    """
    check_loggers(config.train.loggers)
    measure = measure or Measure()
    require_reference(config, reference, measure)
    warn_of_unused_weights(config, tokenizer_weights)
    if data is None:
        if not RunDir(out).exists():
            check_new_run(config)
        return make_plan(config, world_size, config.data.num_images)
    check_looks(config, tokenizer_weights, reference, measure)
    if init_from is not None and parse_hub_name(init_from) is None:
        open_start(init_from, config)
    picked = pick_device(device, ranks_here=ranks_here)
    require_parallel(config.train, world_size, picked)
    limit = None
    if config.train.max_batch_per_rank == AUTO:
        limit = estimated_batch(config, picked, world_size, ranks_here)
    with LatentReader(data) as reader:
        reader.check_matches(config)
        plan = make_plan(config, world_size, reader.num_samples, limit)
        if RunDir(out).exists():
            check_data(RunDir(out), reader)
    run = check_run(out, config, plan.disk_bytes, allow_recipe_change)
    check_start(run, init_from, goes_on=bool(folders_to_read(run)))
    return replace(plan, device_bytes=memory_of_rank(picked, ranks_here))


def seconds_per_step(config: Config, data: Path, device: str, watch_seconds: float) -> float:
    """The time of an optimizer step on this machine, measured on a state that is thrown away.

    The first steps warm up and do not count; of the others, made for `watch_seconds`, the lower quartile: other work
    on the machine that comes and goes must not be taken for its speed.
    """
    with process_group(device) as ranks, LatentReader(data) as reader:
        plan = make_plan(config, ranks.world_size, reader.num_samples)
        state = TrainState.fresh(config, ranks.device, ranks)
        window = Window(ranks, state.model.grouping.lengths)
        times: list[float] = []
        with closing(batches_from(config, plan, reader, ranks, first_step=0)) as batches:
            end = time.monotonic() + watch_seconds
            while time.monotonic() < end or len(times) < 2 * WARM_UP_STEPS:
                began = time.monotonic()
                take_step(state, plan, batches, ranks, window)
                window.read(state.step, plan.global_batch_size)
                times.append(time.monotonic() - began)
        counted = sorted(times[WARM_UP_STEPS:])
        return counted[len(counted) // 4]


def batches_from(
    config: Config, plan: TrainPlan, reader: LatentReader, ranks: Ranks, first_step: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The micro-batches of this rank, from a step on; mirrored with p = 0.5 where the recipe says so."""
    seed, batch = config.train.seed, plan.global_batch_size
    yield from LatentLoader(
        reader, SampleStream(plan.num_images, batch, seed), ranks.rank, ranks.world_size, plan.accumulation_steps,
        first_step, mirrored=(lambda step: draw_mirrored(seed, step, batch)) if config.data.mirror else None,
        pin_memory=ranks.device.type == "cuda",
    )  # fmt: skip


def _run_steps(
    state: TrainState, plan: TrainPlan, reader: LatentReader, run: RunDir, ranks: Ranks, preview: Preview | None
) -> dict[str, Any]:
    """Take the remaining steps, logging, looking and saving as the recipe says."""
    config, began = state.config.train, time.monotonic()
    writer = CheckpointWriter(run, config.keep_last, config.keep_every, writes=ranks.is_main)
    records = ranks.on_all(lambda: Records(run, state.config, state.step, enabled=ranks.is_main))
    window = Window(ranks, state.model.grouping.lengths)
    facts = {"world_size": ranks.world_size, "batch_size_per_rank": plan.batch_size_per_rank}
    with (
        noted_state(run, state, enabled=ranks.is_main) as note,
        closing(writer), closing(records), stop_signals() as request,
        progress(plan.total_steps, "train", "step", initial=state.step, enabled=ranks.is_main) as bar,
        closing(batches_from(state.config, plan, reader, ranks, state.step)) as batches,
    ):  # fmt: skip

        def look(missing: bool = False) -> Signals | None:
            """Preview and evaluation; the signal that came meanwhile, if one did."""
            if preview is None or not preview.is_due(state.step):
                return None
            note.write("drawing")
            paused = window.pause()
            try:
                preview.look(state, records, request.interrupt, missing)
            except StopError:
                return request.agreed(ranks)
            finally:
                window.resume(paused)
                note.write("running")
            return None

        stopped = look(missing=True) if state.step else None  # what a stop at this very step has left out
        if stopped:
            raise _stopped(stopped, state)
        while state.step < plan.total_steps:
            take_step(state, plan, batches, ranks, window)
            note.step_taken()
            final, asked = state.step == plan.total_steps, request.agreed(ranks)
            evaluates = preview is not None and preview.evaluates(state.step)  # no signal may have to wait for it
            saves = final or asked is not None or evaluates or state.step % config.checkpoint_every == 0
            bad_in_a_row = 0
            if saves or state.step % config.log_every == 0:  # a kill would lose what a checkpoint has and no record
                bad_in_a_row = _log(state, plan, reader, ranks, window, records, bar)
            hopeless = bad_in_a_row >= config.max_bad_steps
            if saves or hopeless:
                writer.save(state.step, state.groups(), facts)
            stopped = look() if final or not asked else asked
            if stopped and not (saves or hopeless):
                if window.steps:
                    _log(state, plan, reader, ranks, window, records, bar)
                writer.save(state.step, state.groups(), facts)
            if final or stopped or hopeless:
                note.write("saving")
                _finish_writing(writer, state, ranks)
            if hopeless:
                raise UserError(
                    f"The loss or gradient was not finite for {bad_in_a_row} steps in a row, up to step {state.step}; "
                    "a checkpoint from before them is written.",
                    "Look at skipped_steps.jsonl, then go on with --allow-recipe-change and a lower "
                    "--set train.base_lr or --set train.precision=bf16 (tf32 and fp32 are safer still).",
                    exit_code=1,
                )
            if stopped:
                raise _stopped(stopped, state)
    losses = [record["loss"] for record in read_metrics(run.metrics) if "loss" in record]
    return {
        "run": str(run.root),
        "steps": state.step,
        "loss": losses[-1] if losses else None,
        "seconds": time.monotonic() - began,
    }


def _stopped(signal: Signals, state: TrainState) -> UserError:
    return UserError(
        f"Stopped by {signal.name} after step {state.step}; a checkpoint is written.",
        "The same command goes on from there.",
        exit_code=128 + signal,
    )


def _log(
    state: TrainState,
    plan: TrainPlan,
    reader: LatentReader,
    ranks: Ranks,
    window: Window,
    records: Records,
    bar: Progress,
) -> int:
    """Write the record of the window and show it; gives the number of bad steps in a row."""
    record, bad_steps = window.read(state.step, plan.global_batch_size)
    speed = record["images_per_second"]
    record["epoch"] = round(state.step * plan.global_batch_size / plan.num_images, 4)
    record["seconds_left"] = (plan.total_steps - state.step) * plan.global_batch_size / speed
    peak = peak_flops(ranks.device, state.config.train.precision)
    record["mfu"] = speed * plan.flops_per_image / (peak * ranks.world_size) if peak else None
    if state.loss_scale:
        record["loss_scale"] = float(state.loss_scale.scale)
    if ranks.is_main:
        for bad_step in bad_steps:
            _tell(bad_step, state, plan, reader, ranks, records)
    records.write(record)
    shown = {key: format(record[key], form) for key, form in SHOWN.items() if record[key] is not None}
    bar.update(state.step - bar.done, **shown)
    return int(record["bad_steps_in_a_row"])


def _tell(
    bad: BadStep, state: TrainState, plan: TrainPlan, reader: LatentReader, ranks: Ranks, records: Records
) -> None:
    """Log a skipped step with its images and timesteps; both follow from the number of the step."""
    config = state.config
    rows = list(bad.rows) or list(range(plan.global_batch_size))
    indices = SampleStream(plan.num_images, plan.global_batch_size, config.train.seed).indices(bad.step)[rows]
    t = draw_step(config, state.model.grouping, bad.step, ranks.device).t[rows].cpu()
    what = "loss" if bad.rows else "gradient"
    records.bad_step(
        step=bad.step + 1,
        not_finite=what,
        indices=indices.tolist(),
        labels=reader.labels[indices].tolist(),
        timesteps=[[round(value, 5) for value in row] for row in t.tolist()],
    )
    log.warning(
        "Step %d was skipped: its %s was not finite (%d images, the first is sample %d at t = %s; all are in "
        "skipped_steps.jsonl).",
        bad.step + 1,
        what,
        len(rows),
        indices[0],
        [round(value, 3) for value in t[0].tolist()],
    )


def _finish_writing(writer: CheckpointWriter, state: TrainState, ranks: Ranks) -> None:
    """Wait, on all ranks, until the checkpoint is on disk; a UserError (exit code 1) if it could not be written."""

    def finish() -> None:
        writer.wait()
        if writer.fault:
            raise UserError(
                f"The checkpoint of step {state.step} could not be written ({writer.fault}).",
                "Free some disk space; the same command goes on from the checkpoint before.",
                exit_code=1,
            )

    ranks.on_main(finish)


def _newest(run: RunDir) -> Checkpoint | None:
    return latest_checkpoint(run) if run.exists() else None


def _batch_before(ranks: Ranks, newest: Checkpoint | None) -> int | None:
    """The batch that the run had until now on as many ranks, or None."""
    same_ranks = newest is not None and newest.state.get("world_size") == ranks.world_size
    return newest.state["batch_size_per_rank"] if newest and same_ranks else None


def _probed_plan(state: TrainState, plan: TrainPlan, reader: LatentReader, ranks: Ranks) -> TrainPlan:
    """The plan with the largest batch that fits, found by trying with what the next step would read."""

    def plan_with(batch: int) -> TrainPlan:
        return make_plan(state.config, ranks.world_size, reader.num_samples, batch)

    def attempt(batch: int) -> None:
        trial = plan_with(batch)
        with closing(batches_from(state.config, trial, reader, ranks, state.step)) as batches:
            some_passes(state, trial, batches, ranks)

    return plan_with(probed_batch(state, ranks, plan.batch_size_per_rank, attempt))


def _preview(
    settings: TrainSettings, plan: TrainPlan, class_names: Sequence[str], run: RunDir, ranks: Ranks
) -> Preview | None:
    """The preview, where the recipe asks for grids or evaluations; raises UserError as `require_reference`."""
    train = settings.config.train
    require_reference(settings.config, settings.reference, settings.measure)
    if ranks.is_main:
        warn_of_unused_weights(settings.config, settings.tokenizer_weights)
    if not (train.preview_every or train.eval_every):
        return None
    return Preview(
        settings.config, plan, class_names, run, ranks, settings.tokenizer_weights, settings.reference, settings.measure
    )


def _say_where(run: RunDir, state: TrainState, plan: TrainPlan, checkpoint: Checkpoint, ranks: Ranks) -> None:
    log.info("Going on with '%s' at step %d of %d.", run.root, state.step, plan.total_steps)
    before = checkpoint.state["world_size"]
    if before != ranks.world_size:
        log.info(
            "It ran on %d ranks until now: data, timesteps and noise stay the same, dropout is drawn anew.", before
        )
