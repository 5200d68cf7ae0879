"""What surrounds a training step in the real loop: waiting for data, and the stall that a checkpoint makes.

    python -m benchmarks.loop                                        # xAR-B, batch 8: about ten minutes, 6 GB of disk
    python -m benchmarks.loop --set model.dim=384 --set model.heads=6 --pairs 3    # a smaller network

The loop of `xar train` goes on and on with one state, in stretches of a few steps: with one checkpoint after the first
steps of a stretch, and without. Pairs are made in turns A B B A, after a warm-up; stretches without checkpoints against
each other come first, as the noise floor. A stretch must be long enough for the checkpoint to be written within it,
which is checked: then the difference in time is all that a checkpoint costs, also what its thread takes from the cores
meanwhile. Data waits are measured in the same stretches, around `next(batches)`; the cache is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

from xar_cli.checkpoint import CheckpointWriter, TensorGroups
from xar_cli.config import Config, load_recipe
from xar_cli.data.cache_file import CacheLayout, create_cache
from xar_cli.data.latents import LatentReader, LatentWriter
from xar_cli.distributed import Ranks
from xar_cli.run_dir import RunDir, format_bytes
from xar_cli.train import loop
from xar_cli.train.plan import TrainPlan, make_plan
from xar_cli.train.run import open_run
from xar_cli.train.state import TrainState

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)
NEVER = 10**9
SAMPLES = 2048  # in the cache


@dataclass
class Clock:
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


clock = Clock()


class TimedWriter(CheckpointWriter):
    """The writer of the loop, timed; the checkpoint at the end of a stretch is left out."""

    last_step = 0

    def save(self, step: int, groups: TensorGroups, state: Mapping[str, Any]) -> None:
        """As the loop's."""
        if step == self.last_step:
            return
        began = time.perf_counter()
        super().save(step, groups, state)
        clock.blocked.append(time.perf_counter() - began)

    def _write(self, *arguments: Any) -> None:
        began, busy = time.perf_counter(), time.thread_time()
        super()._write(*arguments)
        clock.written.append((began, time.perf_counter()))
        clock.writing = time.thread_time() - busy


class TimedReader(LatentReader):
    """The reader of the loop, with the processor time of its threads."""

    def read(self, *arguments: Any) -> Any:
        """As the loop's."""
        began = time.thread_time()
        try:
            return super().read(*arguments)
        finally:
            clock.reading += time.thread_time() - began


def timed_batches(*arguments: Any) -> Generator[tuple[Tensor, Tensor], None, None]:
    batches = _batches_from(*arguments)
    try:
        while True:
            began = time.perf_counter()
            batch = next(batches)
            clock.waits.append(time.perf_counter() - began)
            yield batch
    finally:
        batches.close()


def timed_step(*arguments: Any) -> None:
    _take_step(*arguments)
    clock.steps.append(time.perf_counter())


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
    state: TrainState, plan: TrainPlan, reader: LatentReader, run: RunDir, steps: int, save_after: int
) -> Clock:
    """The real loop for some steps; a checkpoint after `save_after` of them, none where that is 0."""
    global clock
    clock = Clock()
    end = state.step + steps
    every = state.step + save_after if save_after else NEVER  # its first multiple beyond here is the only one
    train = state.config.train.model_copy(update={"checkpoint_every": every, "log_every": steps})
    state.config = state.config.model_copy(update={"train": train})
    TimedWriter.last_step = end
    loop._run_steps(state, replace(plan, total_steps=end), reader, run, ALONE, None)
    if save_after and (len(clock.written) != 1 or clock.written[0][1] > clock.steps[-1]):
        raise SystemExit(f"The checkpoint was not written within {steps} steps: give more --steps.")
    return clock


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a stretch")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to put cache and checkpoints; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = [f"train.global_batch_size={options.batch}", f"train.max_batch_per_rank={options.batch}"]
    config = load_recipe(options.recipe, [*batch, "train.keep_last=1", "data.mirror=true", *options.overrides])
    loop.take_step, loop.batches_from, loop.CheckpointWriter = timed_step, timed_batches, TimedWriter  # type: ignore

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write_cache(Path(name) / "latents.h5", config)
        run, state = RunDir(Path(name) / "run"), TrainState.fresh(config, CPU, ALONE)
        with TimedReader(Path(name) / "latents.h5") as reader:
            plan = make_plan(config, 1, reader.num_samples)
            open_run(run, config, Path(name) / "latents.h5", reader, plan.as_dict())

            def go(save_after: int) -> Clock:
                found = stretch(state, plan, reader, run, options.steps, save_after)
                print(f"{found.seconds:.2f} s {'with' if save_after else 'without'} a checkpoint", flush=True)
                return found

            for save_after in (0, 2):  # warm-up: compilation, page cache, memory of the copies
                go(save_after)
            noise, pairs, quiet = [], [], []
            for _ in range(options.pairs):
                first, second = go(0), go(0)
                noise.append(second.seconds / first.seconds)
                quiet += [first, second]
            for pair in range(options.pairs):
                without, with_one = (go(0), go(2)) if pair % 2 == 0 else (go(2), go(0))[::-1]
                pairs.append((without, with_one))
                quiet.append(without)

    step = statistics.median(one.seconds / (options.steps - 1) for one in quiet)
    stalls = [with_one.seconds - without.seconds for without, with_one in pairs]
    result: dict[str, Any] = {
        "parameters": plan.parameters, "checkpoint_bytes": plan.checkpoint_bytes, "step_seconds": step,
        "stretch_steps": options.steps - 1,
        "noise: without a checkpoint against itself": spread(noise),
        "images/s with one checkpoint against without": spread([a.seconds / b.seconds for a, b in pairs]),
        "stall of one checkpoint, seconds": spread(stalls),
        "of which save() blocks the loop, seconds": spread([b.blocked[0] for _, b in pairs]),
        "its thread writes for, seconds": spread([end - began for _, b in pairs for began, end in b.written]),
        "processor time of its thread, seconds": spread([b.writing for _, b in pairs]),
        "share of time waiting for data": spread([sum(one.waits[1:]) / one.seconds for one in quiet]),
        "share of processor time reading data": spread([one.reading / one.seconds / options.threads for one in quiet]),
        "checkpoint_every at which the stall is 5 %": statistics.median(stalls) / (0.05 * step),
    }  # fmt: skip
    if options.json:
        machine = {"machine": platform.processor(), "load": os.getloadavg(), "torch": torch.__version__}
        print(json.dumps({**machine, **result}))
        return
    print(f"{plan.parameters / 1e6:.1f} M parameters, {format_bytes(plan.checkpoint_bytes)} a checkpoint, "
          f"{step:.2f} s a step of {options.batch} images, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for key, found in result.items():
        if isinstance(found, dict):
            print(f"{key}: {found['median']:.4g} (min {found['min']:.4g}, max {found['max']:.4g}, {found['count']})")
    every = result["checkpoint_every at which the stall is 5 %"]
    print(f"the stall is 5 % where a checkpoint is written every {every:.0f} steps of {options.batch} images")


if __name__ == "__main__":
    main()
