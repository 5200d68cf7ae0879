"""What surrounds a training step in the real loop: waiting for data, and the stall that a checkpoint makes.

    python -m benchmarks.loop                                        # xAR-B, batch 8: about ten minutes, 6 GB of disk
    python -m benchmarks.loop --set model.dim=384 --set model.heads=6 --pairs 3    # a smaller network
    python -m benchmarks.loop --device cuda --pairs 1                # batch 64, stretches as long as a checkpoint needs

The loop of `xar train` goes on and on with one state, in stretches of a few steps: with one checkpoint after the first
steps of a stretch, and without. Pairs are made in turns A B B A, after a warm-up; stretches without checkpoints against
each other come first, as the noise floor. A stretch must be long enough for the checkpoint to be written within it,
which is checked: then the difference in time is all that a checkpoint costs, also what its thread takes from the cores
meanwhile. Data waits are measured in the same stretches, around `next(batches)`; the cache is in the page cache. With a
GPU the steps of a stretch are only queued, as in a run; the clock waits for it after the first step and the last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import positive, say, synchronise
from xar_cli.checkpoint import CheckpointWriter, TensorGroups
from xar_cli.config import Config
from xar_cli.data.cache_file import CacheLayout, create_cache
from xar_cli.data.latents import LatentReader, LatentWriter
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.run_dir import RunDir, format_bytes
from xar_cli.train import loop
from xar_cli.train.plan import TrainPlan, make_plan
from xar_cli.train.run import open_run
from xar_cli.train.state import TrainState

NEVER = 10**9
SAMPLES = 2048  # in the cache
BATCH = {"cpu": 8, "cuda": 64}
STEPS = 8  # of a stretch on a CPU
WARM_UP_STEPS = 20  # of a stretch on a GPU that only shows how long a step and a checkpoint take
MARGIN = 1.5  # by which the stretches of a GPU are longer than the writing of a checkpoint
IN_MEMORY = Path("/dev/shm")


@dataclass
class Watch:
    """What is measured in one stretch of steps."""

    steps: list[float] = field(default_factory=list)  # when each step ended
    waits: list[float] = field(default_factory=list)  # seconds in each next(batches)
    blocked: list[float] = field(default_factory=list)  # seconds in each CheckpointWriter.save
    written: list[tuple[float, float]] = field(default_factory=list)  # when its thread began and ended
    writing: float = 0.0  # seconds of processor time of that thread
    reading: float = 0.0  # seconds of processor time of the loader's threads

    @property
    def seconds(self) -> float:
        """From the end of the first step to the end of the last."""
        return self.steps[-1] - self.steps[0]


watch = Watch()


class TimedWriter(CheckpointWriter):
    """The writer of the loop, timed; the checkpoint at the end of a stretch is left out."""

    last_step = 0

    def save(self, step: int, groups: TensorGroups, state: Mapping[str, Any]) -> None:
        """As the loop's."""
        if step == self.last_step:
            return
        began = time.perf_counter()
        super().save(step, groups, state)
        watch.blocked.append(time.perf_counter() - began)

    def _write(self, *arguments: Any) -> None:
        began, busy = time.perf_counter(), time.thread_time()
        super()._write(*arguments)
        watch.written.append((began, time.perf_counter()))
        watch.writing = time.thread_time() - busy


class TimedReader(LatentReader):
    """The reader of the loop, with the processor time of its threads."""

    def read(self, *arguments: Any) -> Any:
        """As the loop's."""
        began = time.thread_time()
        try:
            return super().read(*arguments)
        finally:
            watch.reading += time.thread_time() - began


def timed_batches(*arguments: Any) -> Generator[tuple[Tensor, Tensor], None, None]:
    batches = _batches_from(*arguments)
    try:
        while True:
            began = time.perf_counter()
            batch = next(batches)
            watch.waits.append(time.perf_counter() - began)
            yield batch
    finally:
        batches.close()


def timed_step(*arguments: Any) -> None:
    _take_step(*arguments)
    if not watch.steps or arguments[0].step == TimedWriter.last_step:
        synchronise()
    watch.steps.append(time.perf_counter())


_batches_from, _take_step = loop.batches_from, loop.take_step


def write_cache(path: Path, config: Config) -> None:
    """Random moments in the shape of the recipe's."""
    layout = CacheLayout(
        num_samples=SAMPLES, latent_channels=config.latent_channels, grid=config.grid, dtype="float16", flip=True,
        tokenizer="kl16:benchmark", precision="fp32", latent_scale=config.tokenizer.latent_scale,
        image_size=config.data.image_size, image_channels=config.data.image_channels, crop="adm-centre", source="",
    )  # fmt: skip
    labels = np.arange(SAMPLES) % config.data.num_classes
    names = [b"%06d.png" % i for i in range(SAMPLES)]
    create_cache(path, layout, names, labels, [b"%d" % i for i in range(config.data.num_classes)])
    rng = np.random.default_rng(0)
    with LatentWriter(path) as writer:
        for rows in np.split(np.arange(SAMPLES), SAMPLES // 256):
            image, mirror = rng.standard_normal((2, len(rows), *layout.row_shape), dtype=np.float32)
            writer.write(rows, image, mirror)
        writer.commit()


def stretch(
    state: TrainState,
    plan: TrainPlan,
    reader: LatentReader,
    run: RunDir,
    ranks: Ranks,
    steps: int,
    save_after: int,
    must_be_written: bool = True,
) -> Watch:
    """The real loop for some steps; a checkpoint after `save_after` of them, none where that is 0."""
    global watch
    watch = Watch()
    end = state.step + steps
    every = state.step + save_after if save_after else NEVER  # its first multiple beyond here is the only one
    train = state.config.train.model_copy(update={"checkpoint_every": every, "log_every": steps})
    state.config = state.config.model_copy(update={"train": train})
    TimedWriter.last_step = end
    loop._run_steps(state, replace(plan, total_steps=end), reader, run, ranks, None)
    if save_after and must_be_written and (len(watch.written) != 1 or watch.written[0][1] > watch.steps[-1]):
        raise SystemExit(f"The checkpoint was not written within {steps} steps: give more --steps.")
    return watch


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=positive, help="default: 8 on a CPU, 64 on a GPU")
    parser.add_argument(
        "--steps", type=positive, help="of a stretch; default: 8 on a CPU, what a checkpoint needs on a GPU"
    )
    parser.add_argument("--pairs", type=positive, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where to put cache and checkpoints; default: a temporary one, with a GPU in memory"
    )
    parser.add_argument("--json", action="store_true")
    timing.add_clock_options(parser)
    return parser


def place(device: torch.device, needed: int) -> Path | None:
    """Where a GPU's checkpoints go, which a disk would hold up: memory, where it has room for so many bytes."""
    fits = device.type == "cuda" and IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > needed
    return IN_MEMORY if fits else None


@timing.command
def main() -> None:
    options = parser().parse_args()
    device = timing.use_clock(options)
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"There is no folder '{options.folder}'.", "Make it, or leave --folder away.")
    if options.clock == "cpu":
        raise SystemExit("What surrounds a step is measured by the wall's clock.")
    ranks, images = Ranks(0, 0, 1, device), options.batch or BATCH[device.type]
    own = [f"train.global_batch_size={images}", f"train.max_batch_per_rank={images}"]
    config = timing.recipe_with(options.recipe, options.overrides, [*own, "train.keep_last=1", "data.mirror=true"])
    loop.take_step, loop.batches_from, loop.CheckpointWriter = timed_step, timed_batches, TimedWriter  # type: ignore

    plan = make_plan(config, 1, SAMPLES)
    folder = options.folder or place(device, 4 * plan.checkpoint_bytes)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        write_cache(Path(name) / "latents.h5", config)
        run, state = RunDir(Path(name) / "run"), TrainState.fresh(config, device, ranks)
        with TimedReader(Path(name) / "latents.h5") as reader:
            open_run(run, config, Path(name) / "latents.h5", reader, plan.as_dict())

            steps = options.steps or (STEPS if device.type == "cpu" else WARM_UP_STEPS)

            def go(save_after: int, must_be_written: bool = True) -> Watch:
                found = stretch(state, plan, reader, run, ranks, steps, save_after, must_be_written)
                say(f"{found.seconds:.2f} s for {steps} steps {'with' if save_after else 'without'} a checkpoint")
                return found

            chosen = options.steps is not None or device.type == "cpu"
            go(0)  # warm-up: compilation, page cache, memory of the copies
            first_save = go(2, must_be_written=chosen)
            if not chosen:
                step, (began, ended) = go(0).seconds / (steps - 1), first_save.written[0]
                steps = max(steps, 3 + math.ceil(MARGIN * (ended - began) / step))
            state.step = max(state.step, steps)  # so that a stretch reaches one multiple of its `checkpoint_every` only
            noise, pairs, quiet = [], [], []
            for _ in range(options.pairs):
                first, second = go(0), go(0)
                noise.append(second.seconds / first.seconds)
                quiet += [first, second]
            for pair in range(options.pairs):
                without, with_one = (go(0), go(2)) if pair % 2 == 0 else (go(2), go(0))[::-1]
                pairs.append((without, with_one))
                quiet.append(without)

    step = statistics.median(one.seconds / (steps - 1) for one in quiet)
    stalls = [with_one.seconds - without.seconds for without, with_one in pairs]
    result: dict[str, Any] = {
        "parameters": plan.parameters, "checkpoint_bytes": plan.checkpoint_bytes, "step_seconds": step,
        "stretch_steps": steps - 1, "batch": images, "folder": str(folder or tempfile.gettempdir()),
        "noise: without a checkpoint against itself": spread(noise),
        "images/s with one checkpoint against without": spread([a.seconds / b.seconds for a, b in pairs]),
        "stall of one checkpoint, seconds": spread(stalls),
        "of which save() blocks the loop, seconds": spread([b.blocked[0] for _, b in pairs]),
        "save() blocks the loop at first, seconds": first_save.blocked[0],
        "its thread writes for, seconds": spread([end - began for _, b in pairs for began, end in b.written]),
        "processor time of its thread, seconds": spread([b.writing for _, b in pairs]),
        "share of time waiting for data": spread([sum(one.waits[1:]) / one.seconds for one in quiet]),
        "share of processor time reading data": spread([one.reading / one.seconds / options.threads for one in quiet]),
        "checkpoint_every at which the stall is 5 %": statistics.median(stalls) / (0.05 * step),
    }  # fmt: skip
    stall, share = result["stall of one checkpoint, seconds"], result["share of time waiting for data"]
    blocked = result["of which save() blocks the loop, seconds"]
    result["images_per_second"] = images / step
    size = format_bytes(plan.checkpoint_bytes)
    result["summary"] = (
        f"{options.recipe}, batch {images}: {images / step:.1f} images/s in the loop, "
        f"{share['median']:.2%} waiting for data, stall of a checkpoint of {size} {stall['median']:.2f} s "
        f"({stall['min']:.2f} to {stall['max']:.2f}), save() {blocked['median']:.2f} s"
    )
    if options.json:
        print(json.dumps({**timing.machine(options, device), "load": os.getloadavg(), **result}, indent=2))
        return
    print(f"{plan.parameters / 1e6:.1f} M parameters, {format_bytes(plan.checkpoint_bytes)} a checkpoint, "
          f"{step:.2f} s a step of {images} images, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for key, found in result.items():
        if isinstance(found, dict):
            print(f"{key}: {found['median']:.4g} (min {found['min']:.4g}, max {found['max']:.4g}, {found['count']})")
    every = result["checkpoint_every at which the stall is 5 %"]
    print(f"the stall is 5 % where a checkpoint is written every {every:.0f} steps of {images} images")


if __name__ == "__main__":
    main()
