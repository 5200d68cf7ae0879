"""`xar quickstart`: the four stages, one after another, on real handwritten digits.

Calls the same functions as the commands, with the same settings objects; owns only their order, the length of the
training run, and the closing picture.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from xar_cli.cache.stage import cache_latents
from xar_cli.config import Config, load_config_file, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.digits import write_digits
from xar_cli.distributed import pick_device
from xar_cli.errors import UserError
from xar_cli.evaluate import Evaluator
from xar_cli.logs import log
from xar_cli.run_dir import RunDir, write_json
from xar_cli.sample.images import grid_image, image_path
from xar_cli.sample.stage import MANIFEST, SampleSettings, sample
from xar_cli.train.loop import TrainSettings, seconds_per_step, train
from xar_cli.train.plan import make_plan
from xar_cli.train.state import TrainState

RECIPE = "tiny"
RESULT, GRID = "quickstart.json", "digits.png"  # inside the folder of a quickstart, as are the next four
RUN, LATENTS, SAMPLES, DIGITS = "run", "latents.h5", "samples", "digits"
MAX_MINUTES = 10_000
GRID_COLUMNS = 8  # digits of each class in the picture, generated and real
SHARE_OF_TRAINING = 0.7  # of the minutes given; sampling and judging need the rest
SHARE_OF_WATCHING, WATCH_SECONDS = 0.1, 6.0  # of the time for training, and at most: to find how long a step takes
ENOUGH = 0.25  # of the recipe's epochs, for digits that can be read
CAPTION_PIXELS = 24
DIGIT_PIXELS = 64


def quickstart(out: Path, seed: int, minutes: float, device: str = "auto") -> dict[str, Any]:
    """From digits to a Frechet distance; goes on from what is there already.

    Args:
        out: folder for everything that is written.
        seed: of training and sampling.
        minutes: time that it may take on a quiet machine; training is shortened to fit.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        What `--json` prints: metrics, yardsticks, seconds, and the paths of everything written.

    Raises:
        UserError: `out` holds a quickstart with another seed, or `minutes` is no length of time; else as the stages
            raise it.
    """
    if not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"--minutes {minutes:g} is no length of a quickstart.", f"Give up to {MAX_MINUTES}.")
    began = time.monotonic()
    run, cache, result_file = RunDir(out / RUN), out / LATENTS, out / RESULT
    config = load_config_file(run.config) if run.exists() else load_recipe(RECIPE, [f"train.seed={seed}"])
    if config.train.seed != seed:
        raise UserError(
            f"'{out}' holds a quickstart with seed {config.train.seed}.",
            f"Give another --out, or --seed {config.train.seed}.",
        )
    if result_file.exists():
        log.info("'%s' holds a finished quickstart: this is its result. Remove the folder to begin anew.", out)
        return {**json.loads(result_file.read_text(encoding="utf-8")), "paths": paths_in(out)}

    log.info("1/5  digits: real handwritten ones, as two image folders")
    train_folder, heldout_folder = write_digits(out / DIGITS)

    log.info("2/5  cache-latents")
    cache_latents(train_folder, cache, config, device=device, flip="encode" if config.data.mirror else "none")

    log.info("3/5  train")
    if not run.exists():
        config = shorten_to_fit(config, cache, device, minutes * 60 * SHARE_OF_TRAINING)
    train(TrainSettings(config=config, data=cache, out=run.root, device=device))

    log.info("4/5  sample: from the trained network, and from an untrained one for comparison")
    samples = draw(config, run.root, out / SAMPLES, seed, device)
    untrained = draw(
        config, write_untrained(config, out / "untrained.safetensors"), out / "samples-untrained", seed, device
    )
    save_comparison(samples, train_folder, out / GRID)

    log.info("5/5  fid: judged by a classifier that never saw a generated digit")
    judge = Evaluator(train_folder, config.evaluate.protocol)
    ours = judge.evaluate(samples)
    result = {
        "class_accuracy": ours.class_accuracy,
        "frechet_distance": ours.frechet_distance,
        "frechet_floor": judge.evaluate(heldout_folder).frechet_distance,
        "frechet_ceiling": judge.evaluate(untrained).frechet_distance,
        "seconds": time.monotonic() - began,
        "paths": paths_in(out),
    }
    write_json(result_file, result)
    return result


def paths_in(out: Path) -> dict[str, str]:
    """What is written into a folder, as that folder is called now."""
    found = {
        "grid": out / GRID,
        "samples": out / SAMPLES,
        "run": out / RUN,
        "latents": out / LATENTS,
        "train_images": out / DIGITS / "train",
        "heldout_images": out / DIGITS / "heldout",
        "result": out / RESULT,
    }
    return {name: str(path) for name, path in found.items()}


def shorten_to_fit(config: Config, cache: Path, device: str, seconds: float) -> Config:
    """The config with as many epochs as fit into `seconds` on this machine, the recipe's own number at most.

    A few steps are timed when the run begins. From then on the length is a fact of the run like any other, and resuming
    keeps it.
    """
    plan = make_plan(config, 1, config.data.num_images)
    steps = int(seconds / fastest_step(config, cache, device, min(WATCH_SECONDS, seconds * SHARE_OF_WATCHING)))
    if steps >= plan.total_steps:
        return config
    epochs = max(1, steps * plan.global_batch_size // plan.num_images)
    log.info("This machine fits %d of the recipe's %g epochs into the time given.", epochs, config.train.epochs)
    if epochs < ENOUGH * config.train.epochs:
        log.warning("That is too few for good digits: give more --minutes, or stop other work on this machine.")
    return override(config, [f"train.epochs={epochs}"])


def fastest_step(config: Config, cache: Path, device: str, watch_seconds: float) -> float:
    """Seconds of a training step, on as many threads of the CPU as make it fastest; these stay set.

    Threads that share a product wait for each other by spinning, so beside other work one alone may be ten times as
    fast as two.
    """
    together, threads = seconds_per_step(config, cache, device, watch_seconds), torch.get_num_threads()
    if threads == 1 or pick_device(device).type != "cpu":
        return together
    torch.set_num_threads(1)
    alone = seconds_per_step(config, cache, device, watch_seconds)
    if alone > together:
        torch.set_num_threads(threads)
        return together
    log.info("One thread is used, which is %.1f times as fast here as %d together.", together / alone, threads)
    return alone


def draw(config: Config, weights: Path, out: Path, seed: int, device: str) -> Path:
    """As many samples as the recipe judges by, all classes alike; the folder they are in."""
    sample(
        SampleSettings(
            config=config,
            weights=str(weights),
            out=out,
            count=config.evaluate.count,
            seed=seed,
            classes=tuple(range(config.data.num_classes)),
            device=device,
        )
    )
    return out


def write_untrained(config: Config, path: Path) -> Path:
    """Weights of the network before its first step, as a file."""
    save_file(dict(TrainState.fresh(config, pick_device("cpu")).model.named_parameters()), path)
    return path


def save_comparison(samples: Path, real: Path, path: Path) -> None:
    """A picture with a row for each class: generated digits on the left, real ones on the right."""
    labels = json.loads((samples / MANIFEST).read_text(encoding="utf-8"))["labels"]
    generated_paths, real_paths = [], []
    for label in sorted(set(labels)):
        places = [index for index, other in enumerate(labels) if other == label]
        generated_paths += [image_path(samples, index) for index in places[:GRID_COLUMNS]]
        real_paths += sorted((real / str(label)).iterdir())[:GRID_COLUMNS]
    left, right = (grid_image([_open(file) for file in files], GRID_COLUMNS) for files in (generated_paths, real_paths))
    gap = CAPTION_PIXELS
    picture = Image.new("RGB", (left.width + gap + right.width, left.height + CAPTION_PIXELS), "white")
    picture.paste(left, (0, CAPTION_PIXELS))
    picture.paste(right, (left.width + gap, CAPTION_PIXELS))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    pen.text((4, 2), "generated", fill="black", font=font)
    pen.text((left.width + gap + 4, 2), "real", fill="black", font=font)
    picture.save(path)


def _open(path: Path) -> Image.Image:
    """An 8 x 8 digit, enlarged smoothly: easier on the eye than 64 squares."""
    with Image.open(path) as image:
        return image.resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)
