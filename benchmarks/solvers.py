"""Quality against network evaluations on the digits: every solver and schedule, one table.

    python -m benchmarks.solvers --out solvers            # trains the quickstart's network first, about 4 minutes
    python -m benchmarks.solvers --out solvers --count 1000 --seeds 2

Each row draws `count` images with the same noise and labels for every solver, once a seed, and gives the Frechet
distance to the training digits and the class accuracy under the classifier of the `digits` protocol: mean and half the
range over the seeds. Evaluations are those of one image: with its class, for guidance, for context. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from xar_cli.config import Config, load_config_file
from xar_cli.config.recipes import override
from xar_cli.evaluate import evaluate
from xar_cli.logs import log, setup_logs
from xar_cli.quickstart import quickstart
from xar_cli.run_dir import RunDir
from xar_cli.sample.plan import SamplingPlan
from xar_cli.sample.stage import SampleSettings, sample


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
    return float(result.frechet_distance), float(result.class_accuracy or 0.0)


def measure(config: Config, run: Path, real: Path, out: Path, count: int, seed: int) -> tuple[float, float]:
    """Frechet distance and class accuracy of freshly drawn images."""
    draw(config, run, out, count, seed)
    return judge(out, real, config.evaluate.protocol)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("solvers"), help="folder of a quickstart, made where missing")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    setup_logs()
    torch.set_num_threads(options.threads)
    paths = quickstart(options.out, seed=0, minutes=5, device="cpu")["paths"]
    run, real = Path(paths["run"]), Path(paths["train_images"])
    base = load_config_file(RunDir(run).config)
    print("| solver | steps | guidance | evaluations | Frechet distance | class accuracy |\n|---|---|---|---|---|---|")
    for setting in SETTINGS:
        config = configured(base, setting, options.count)
        found = [
            measure(config, run, real, options.out / "solver-samples", options.count, seed)
            for seed in range(options.seeds)
        ]
        distances, accuracies = [one[0] for one in found], [one[1] for one in found]
        half_range = (max(distances) - min(distances)) / 2
        guidance = setting.schedule + ("" if setting.interval == "[0.0, 1.0]" else f", t in {setting.interval}")
        steps = setting.num_steps.strip("'")
        print(
            f"| {setting.solver} | {steps} | {guidance} | {SamplingPlan.of(config).evaluations().total} "
            f"| {statistics.mean(distances):.3f} ± {half_range:.3f} | {statistics.mean(accuracies):.3f} |",
            flush=True,
        )
    shutil.rmtree(options.out / "solver-samples", ignore_errors=True)
    log.info("%d images a row and seed, %d seeds.", options.count, options.seeds)


if __name__ == "__main__":
    main()
