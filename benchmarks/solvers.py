"""Quality against network evaluations on the digits: every solver and schedule, one table.

    python -m benchmarks.solvers --out solvers            # trains the quickstart's network first, some minutes
    python -m benchmarks.solvers --out solvers --count 1000 --seeds 2

The network is that of recipe `tiny` with `--epochs` of training, the same number on every machine; the quickstart fits
its own to the time. Each row draws `count` images with the same noise and labels for every solver, once a seed, and
gives the Frechet distance to the training digits and the class accuracy under the classifier of the `digits` protocol:
mean and half the range over the seeds. Evaluations are those of one image: with its class, for guidance, for context.
Markdown on stdout; it goes on with what is in `--out`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import timing
from benchmarks.timing import positive
from xar_cli.cache.stage import cache_latents
from xar_cli.config import Config, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.digits import write_digits
from xar_cli.evaluate import evaluate
from xar_cli.logs import setup_logs
from xar_cli.sample.plan import SamplingPlan
from xar_cli.sample.stage import SampleSettings, sample
from xar_cli.train.loop import TrainSettings, train


class Setting(NamedTuple):
    """One row: what of the recipe's sampling section is changed."""

    solver: str
    num_steps: str
    schedule: str = "linear"
    interval: str = "[0.0, 1.0]"


SETTINGS = (
    *(Setting("euler", steps) for steps in ("5", "10", "20", "50")),
    *(Setting("euler_maruyama", steps) for steps in ("10", "20", "50")),
    *(Setting("heun", steps) for steps in ("6", "10", "20")),
    *(Setting("multistep", steps) for steps in ("5", "8", "10", "20")),
    Setting("euler", "'20:8'"),
    Setting("multistep", "'10:5'"),
    Setting("multistep", "'12:4'"),
    Setting("multistep", "10", "constant"),
    Setting("multistep", "10", "cosine"),
    Setting("multistep", "10", "linear", "[0.1, 0.8]"),
)  # fmt: skip


def configured(config: Config, setting: Setting, count: int) -> Config:
    """The recipe with the settings of a row."""
    changes = {
        "solver": setting.solver, "num_steps": setting.num_steps, "guidance_schedule": setting.schedule,
        "guidance_interval": setting.interval, "batch_size": str(min(count, 500)),
    }  # fmt: skip
    return override(config, [f"sample.{key}={value}" for key, value in changes.items()])


def draw(config: Config, run: Path, out: Path, count: int, seed: int, device: str = "cpu") -> None:
    """Draw images of all classes in turn into a folder; what it held goes first."""
    shutil.rmtree(out, ignore_errors=True)
    classes = tuple(range(config.data.num_classes))
    sample(
        SampleSettings(config=config, weights=str(run), out=out, count=count, seed=seed, classes=classes, device=device)
    )


def judge(samples: Path, real: Path, protocol: str) -> tuple[float, float]:
    """Frechet distance and class accuracy of a folder of images."""
    result = evaluate(samples, real, protocol)
    assert result.class_accuracy is not None  # the labels of our own samples
    return result.frechet_distance, result.class_accuracy


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and half the range; of one seed, its number alone; of none, a dash."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def train_network(out: Path, epochs: float) -> tuple[Config, Path, Path, int]:
    """The network that all rows draw from: its recipe, run folder, the digits it is trained on, and its steps."""
    config, run, cache = load_recipe("tiny", [f"train.epochs={epochs}"]), out / "run", out / "latents.h5"
    real, _ = write_digits(out / "digits")
    cache_latents(real, cache, config, device="cpu", flip="none")
    return config, run, real, train(TrainSettings(config=config, data=cache, out=run, device="cpu"))["steps"]


def measure(config: Config, run: Path, real: Path, out: Path, count: int, seed: int) -> tuple[float, float]:
    """Frechet distance and class accuracy of freshly drawn images."""
    draw(config, run, out, count, seed)
    return judge(out, real, config.evaluate.protocol)


@timing.command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("solvers"), help="folder of the network and its digits")
    parser.add_argument("--epochs", type=float, default=61.0)
    parser.add_argument("--count", type=positive, default=500)
    parser.add_argument("--seeds", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=2)
    options = parser.parse_args()
    setup_logs()
    torch.set_num_threads(options.threads)
    base, run, real, steps = train_network(options.out, options.epochs)
    print("| solver | steps | guidance | evaluations | Frechet distance | class accuracy |\n|---|---|---|---|---|---|")
    for setting in SETTINGS:
        config = configured(base, setting, options.count)
        found = [
            measure(config, run, real, options.out / "solver-samples", options.count, seed)
            for seed in range(options.seeds)
        ]
        guidance = setting.schedule + ("" if setting.interval == "[0.0, 1.0]" else f", t in {setting.interval}")
        num_steps = setting.num_steps.strip("'")
        print(
            f"| {setting.solver} | {num_steps} | {guidance} | {SamplingPlan.of(config).evaluations().total} "
            f"| {spread([one[0] for one in found], 3)} | {spread([one[1] for one in found], 3)} |",
            flush=True,
        )
    shutil.rmtree(options.out / "solver-samples", ignore_errors=True)
    print(
        f"\nRecipe `tiny`, {options.epochs:g} epochs ({steps} steps), seed 0; {options.count} images a row and seed, "
        f"{options.seeds} seeds; {timing.processor()}, torch {torch.__version__}, commit {timing.commit()}."
    )


if __name__ == "__main__":
    main()
