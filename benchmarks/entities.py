"""The paper's Tables 3, 4 and 5 in miniature: every kind of entity, cell size and context, on handwritten digits.

    python -m benchmarks.entities --out entities --device cuda --jobs 13   # minutes on a GPU with 16 CPU cores
    python -m benchmarks.entities --out entities            # a day on two cores; goes on where it stopped
    python -m benchmarks.entities --out entities --report   # only write docs/entities.md from what is there

Every row is trained with the quickstart's network at equal compute: the floating-point operations of training are
counted from shapes, and a row whose image costs more takes fewer steps. Entities (Table 3) and contexts (Table 5) are
compared on the digits as they are, 8 x 8, in tokens of 2 x 2 pixels: a 4 x 4 grid. Cell sizes (Table 4) are compared
on the paper's 16 x 16 grid, so that its five sizes make its K = 256, 64, 16, 4 and 1: the digits are enlarged to
16 x 16, each pixel four equal ones, in tokens of one pixel; what is drawn is reduced to 8 x 8 again before it is
judged. Rows that are the same network are trained once. Each run is judged at several guidance scales by the `digits`
protocol.

The tables go between two marks in docs/entities.md; what is written around them is left alone. Of `--out` they need
`results/` and `samples/` alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.solvers import draw, judge
from xar_cli.cache.stage import cache_latents
from xar_cli.config import Config, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.digits import write_digits
from xar_cli.evaluate import evaluate
from xar_cli.logs import log, setup_logs
from xar_cli.model import XAR, build_grouping
from xar_cli.run_dir import write_json
from xar_cli.sample.images import grid_image, image_path
from xar_cli.sample.manifest import MANIFEST
from xar_cli.sample.plan import SamplingPlan, flops_per_image
from xar_cli.train.cost import training_flops
from xar_cli.train.loop import TrainSettings, train

REPORT = Path(__file__).resolve().parent.parent / "docs" / "entities.md"
PICTURE = Path("images") / "entities.png"  # beside the report
MARKS = ("<!-- made by benchmarks/entities.py -->", "<!-- end -->")
TRAINING = ("train.checkpoint_every=500", "train.keep_last=1", "train.log_every=100")
SAMPLING = ("sample.solver=multistep", "sample.num_steps=10")
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
DIGIT_SIDE = 8  # pixels of a scan, and of what the protocol judges
PICTURED_SEED, PICTURED = 0, 2  # whose samples are kept, and how many of each class


class Grid(NamedTuple):
    """How a digit becomes tokens: side of the image and of a token, in pixels."""

    side: int
    patch: int

    @property
    def text(self) -> str:
        """For people."""
        tokens = self.side // self.patch
        return f"{tokens} x {tokens} tokens"

    @property
    def enlarged(self) -> int:
        """How many pixels of the image stand side by side for one of the scan."""
        return self.side // DIGIT_SIDE


class Study(NamedTuple):
    """One network to train."""

    grid: Grid
    entity: str
    context: str = "random"

    @property
    def slug(self) -> str:
        """A name for files."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.entity.removeprefix("{kind:")).split()
        return "-".join([f"{self.grid.side}px", f"patch{self.grid.patch}", *words, self.context])


class Row(NamedTuple):
    """One row of a table: the paper's recipe, and its miniature."""

    recipe: str
    label: str
    study: Study


def cell(size: int) -> str:
    """The entity of square cells."""
    return f"{{kind: cell, size: {size}}}"


SMALL, LARGE = Grid(side=8, patch=2), Grid(side=16, patch=1)
YARDSTICKS = {SMALL: Study(SMALL, cell(2)), LARGE: Study(LARGE, cell(8))}  # K = 4, the paper's choice
EPOCHS = {SMALL: 60.0, LARGE: 120.0}  # of the yardstick
TABLES = {
    "Table 3: what X is": (
        Row("entity-token", "token", Study(SMALL, "{kind: token}")),
        Row("entity-subsample", "subsample, stride 2", Study(SMALL, "{kind: subsample, stride: 2}")),
        Row("entity-image", "image", Study(SMALL, "{kind: image}")),
        Row("entity-scale", "scale, 1 2 4", Study(SMALL, "{kind: scale, sizes: [1, 2, 4]}")),
        Row("entity-cell", "cell, 2 x 2", Study(SMALL, cell(2))),
    ),
    "Table 4: size of the cell": tuple(
        Row(f"cell-{size}", f"{size} x {size}", Study(LARGE, cell(size))) for size in (1, 2, 4, 8, 16)
    ),
    "Table 5: context while training": (
        Row("context-clean", "clean", Study(SMALL, cell(2), "clean")),
        Row("context-increasing", "increasing", Study(SMALL, cell(2), "increasing")),
        Row("context-decreasing", "decreasing", Study(SMALL, cell(2), "decreasing")),
        Row("context-random", "random", Study(SMALL, cell(2))),
    ),
}
STUDIES = tuple(dict.fromkeys(row.study for rows in TABLES.values() for row in rows))


class Setup(NamedTuple):
    """What all runs have in common: epochs of the yardsticks, arithmetic, images at each guidance scale, device."""

    epochs: dict[Grid, float]
    precision: str = "fp32"
    images: int = 1000
    device: str = "cpu"

    def asked(self, study: Study) -> dict[str, Any]:
        """What a result must have been made with to count as this setup's; the device may be another."""
        return {"epochs": self.epochs[study.grid], "precision": self.precision, "images": self.images}


DEFAULTS = Setup(EPOCHS)


def recipe_of(study: Study, seed: int = 0, setup: Setup = DEFAULTS) -> Config:
    """The recipe of a study, with the epochs that its compute allows."""
    grid, yardstick = study.grid, YARDSTICKS[study.grid]
    base = [
        f"data.image_size={grid.side}", f"tokenizer.patch={grid.patch}", f"train.seed={seed}",
        f"train.precision={setup.precision}", *TRAINING, *SAMPLING,
    ]  # fmt: skip
    if setup.device != "cpu":  # a small network waits for its launches: the fewer batches the better
        base.append(f"sample.batch_size={setup.images}")

    def build(study: Study, epochs: float) -> Config:
        changes = [f"entity={study.entity}", f"train.context={study.context}", f"train.epochs={epochs}"]
        return load_recipe("tiny", [*base, *changes])

    share = flops_of_training(build(yardstick, 1)) / flops_of_training(build(study, 1))
    return build(study, round(setup.epochs[grid] * share, 3))


def flops_of_training(config: Config) -> float:
    """FLOP of one image's forward and backward pass."""
    with torch.device("meta"):
        return training_flops(config, XAR(config))


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel (H, W) as a square of equal ones, (factor H, factor W)."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def reduce(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The rounded mean of each square of (factor H, factor W) uint8 pixels, (H, W) uint8."""
    height, width = pixels.shape
    squares = pixels.reshape(height // factor, factor, width // factor, factor)
    return np.rint(squares.mean(axis=(1, 3))).astype(np.uint8)


def resized(source: Path, target: Path, resize: Callable[[np.ndarray, int], np.ndarray], factor: int) -> Path:
    """A folder of grey images with all of them resized, made anew; by a factor of 1 it is the folder itself."""
    if factor == 1:
        return source
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("*.png")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            Image.fromarray(resize(np.asarray(image), factor)).save(copy)
    if (source / MANIFEST).exists():
        shutil.copy(source / MANIFEST, target)  # knows the classes
    return target


def cache_of(out: Path, grid: Grid) -> Path:
    """The latent cache of the digits for a grid."""
    return out / f"latents-{grid.side}px-patch{grid.patch}.h5"


def result_of(out: Path, study: Study, seed: int) -> Path:
    """Where the result of a run is written."""
    return out / "results" / f"{study.slug}-seed{seed}.json"


def samples_of(out: Path, study: Study, seed: int, scale: float) -> Path:
    """Where the images of a run are drawn."""
    return out / "samples" / f"{study.slug}-seed{seed}-guidance{scale:g}"


def run(out: Path, study: Study, seed: int, setup: Setup) -> Path:
    """Train one network and judge it; goes on from its checkpoint where it was stopped."""
    torch.set_num_threads(1)
    config, folder = recipe_of(study, seed, setup), out / "runs" / f"{study.slug}-seed{seed}"
    path, asked = result_of(out, study, seed), setup.asked(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    trained_before = read_result(path).get("seconds", 0.0) if folder.exists() else 0.0
    done = train(TrainSettings(config=config, data=cache_of(out, study.grid), out=folder, device=setup.device))
    result = {
        "steps": done["steps"],
        "loss": done["loss"],
        "seconds": trained_before + done["seconds"],  # of a finished run that is judged again: nearly none
        "device": torch.cuda.get_device_name(setup.device) if setup.device != "cpu" else "CPU",
        "torch": torch.__version__,
        "asked": asked,
        "guidance": read_result(path, asked).get("guidance", {}),
    }
    write_json(path, result)
    for scale in GUIDANCE:
        if f"{scale:g}" in result["guidance"]:
            continue
        samples = samples_of(out, study, seed, scale)
        draw(override(config, [f"sample.guidance_scale={scale}"]), folder, samples, setup.images, seed, setup.device)
        judged = resized(samples, samples.with_name(f"{samples.name}-reduced"), reduce, study.grid.enlarged)
        result["guidance"][f"{scale:g}"] = judge(judged, out / "digits" / "train", config.evaluate.protocol)
        if judged != samples:
            shutil.rmtree(judged)
        keep_pictured(samples, seed)
        write_json(path, result)
    return path


def labels_of(samples: Path) -> list[int]:
    """The class of each image of a folder."""
    return list(json.loads((samples / MANIFEST).read_text(encoding="utf-8"))["labels"])


def pictured(samples: Path) -> list[Path]:
    """The images of a folder that the picture shows: the first of each class."""
    labels = labels_of(samples)
    places = [[place for place, other in enumerate(labels) if other == label] for label in sorted(set(labels))]
    return [image_path(samples, place) for of_class in places for place in of_class[:PICTURED]]


def keep_pictured(samples: Path, seed: int) -> None:
    """Delete the images that the picture does not show."""
    if seed != PICTURED_SEED:
        shutil.rmtree(samples)
        return
    for path in set(samples.glob("*.png")) - set(pictured(samples)):
        path.unlink()


def read_result(path: Path, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    """The result of a run so far; empty where there is none, or none made as asked."""
    if not path.exists():
        return {}
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if asked in (None, result["asked"]) else {}


def is_complete(result: dict[str, Any]) -> bool:
    """Whether a run was judged at every guidance scale."""
    return all(f"{scale:g}" in result.get("guidance", {}) for scale in GUIDANCE)


def in_order(seeds: int) -> list[tuple[Study, int]]:
    """All runs, the longest first, so that no process is left alone with one at the end."""

    def entities(study: Study) -> int:
        config = recipe_of(study)
        return int(build_grouping(config.entity, config.grid).num_entities)

    studies = sorted(STUDIES, key=lambda study: (-study.grid.side, -entities(study)))
    return [(study, seed) for study in studies for seed in range(seeds)]


def prepare(out: Path, device: str) -> None:
    """The digits, and a latent cache of them for each grid."""
    images, _ = write_digits(out / "digits")
    for grid, yardstick in YARDSTICKS.items():
        if not cache_of(out, grid).exists():
            enlarged = resized(images, images.with_name(f"train-{grid.side}px"), enlarge, grid.enlarged)
            cache_latents(enlarged, cache_of(out, grid), recipe_of(yardstick), device=device, flip="none")


class Found(NamedTuple):
    """What is known of a study: the guidance scale with the lowest mean distance, and the numbers there, by seed."""

    scale: float
    distances: list[float]
    accuracies: list[float]
    unguided: list[float]
    results: dict[int, dict[str, Any]]


def results_of(out: Path, study: Study) -> dict[int, dict[str, Any]]:
    """The complete results of a study, by seed."""
    paths = sorted((out / "results").glob(f"{study.slug}-seed*.json"))
    results = {int(path.stem.rpartition("seed")[2]): read_result(path) for path in paths}
    return {seed: result for seed, result in results.items() if is_complete(result)}


def found_of(out: Path, study: Study) -> Found | None:
    """What the results of all seeds so far say."""
    results = results_of(out, study)
    if not results:
        return None

    def at(scale: float, place: int) -> list[float]:
        return [result["guidance"][f"{scale:g}"][place] for result in results.values()]

    best = min(GUIDANCE, key=lambda scale: statistics.mean(at(scale, 0)))
    return Found(best, at(best, 0), at(best, 1), at(1.0, 0), results)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and half the range; of one seed, its number alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(out: Path, title: str, rows: tuple[Row, ...]) -> str:
    """One table in Markdown."""
    lines = [
        f"### {title}\n",
        "| here | paper | K | steps | Fréchet distance | at guidance | unguided | class accuracy | seeds "
        "| evaluations, GFLOP an image | paper's FID |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = found_of(out, row.study)
        if found is None:
            continue
        config = override(recipe_of(row.study), [f"sample.guidance_scale={found.scale}"])
        plan, published = SamplingPlan.of(config), load_recipe(f"ablations/{row.recipe}").published
        steps = next(iter(found.results.values()))["steps"]
        assert published is not None
        lines.append(
            f"| {row.label} | {row.label.split(',')[0]} | {len(plan.num_steps)} "
            f"| {steps:,} | {spread(found.distances)} | {found.scale:g} | {spread(found.unguided)} "
            f"| {spread(found.accuracies, 3)} | {len(found.results)} "
            f"| {plan.evaluations().total}, {flops_per_image(config, plan) / 1e9:.2f} | {published.fid} |"
        )
    return "\n".join(lines)


def circumstances(out: Path) -> str:
    """What the runs were made with and how long training took."""
    made = [(study.grid, result) for study in STUDIES for result in results_of(out, study).values()]
    if not made:
        return "Nothing is measured yet."
    results = [result for _, result in made]

    def every(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    epochs = every(f"{result['asked']['epochs']:g} for {grid.text}" for grid, result in made)
    seconds = [result["seconds"] for result in results]
    return (
        f"{len(results)} networks. Device: {every(result['device'] for result in results)}; torch "
        f"{every(result['torch'] for result in results)}; {every(result['asked']['precision'] for result in results)}. "
        f"Epochs of the K = 4 cell: {epochs}. Images at each guidance scale: "
        f"{every(str(result['asked']['images']) for result in results)}. Training took {min(seconds):.0f} to "
        f"{max(seconds):.0f} seconds a network while others shared the device, {sum(seconds) / 60:.0f} minutes if they "
        "are added up."
    )


def yardsticks(out: Path) -> str:
    """What the distance is for real held-out digits."""
    train_images, heldout = write_digits(out / "digits")
    found = evaluate(heldout, train_images, "digits")
    return (
        f"The {found.samples.count} real held-out digits have a Fréchet distance of {found.frechet_distance:.2f} to "
        "the same reference; so few images raise it a little, beside those of the table."
    )


def save_picture(out: Path, path: Path) -> list[Study]:
    """A row of digits for each study, from one seed at the best guidance scale of all; the studies that are there."""
    images, studies = [], []
    for study in STUDIES:
        found = found_of(out, study)
        if found is None or PICTURED_SEED not in found.results:
            continue
        for file in pictured(samples_of(out, study, PICTURED_SEED, found.scale)):
            with Image.open(file) as image:
                images.append(image.resize((32, 32), Image.Resampling.BICUBIC))
        studies.append(study)
    if images:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = grid_image(images, 10 * PICTURED, gap=1)
        size = (picture.width // 2, picture.height // 2)
        picture.resize(size, Image.Resampling.LANCZOS).quantize(64).save(path)
    return studies


def write_report(out: Path) -> None:
    """Put the tables between the marks of docs/entities.md."""
    text = REPORT.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise SystemExit(f"{REPORT} must hold {' and '.join(MARKS)} once each, around the place of the tables.")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    rows = "; ".join(
        f"{study.entity.strip('{}')}, {study.context}, {study.grid.text}"
        for study in save_picture(out, REPORT.parent / PICTURE)
    )
    parts = [
        MARKS[0], *(table(out, title, rows) for title, rows in TABLES.items()), circumstances(out), yardsticks(out),
        f"![Generated digits, a row for each network]({PICTURE.as_posix()})", f"*From top to bottom: {rows}.*",
        MARKS[1],
    ]  # fmt: skip
    REPORT.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("entities"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=1000, help="images drawn at each guidance scale")
    parser.add_argument(
        "--epochs", type=float, nargs=len(EPOCHS), default=list(EPOCHS.values()), metavar=("4x4", "16x16"),
        help="epochs of the K = 4 cell on each grid of tokens; the other rows follow by compute (default: 60 120)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "tf32"), default="fp32", help="arithmetic of all networks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="networks trained at a time, one CPU thread each")
    parser.add_argument("--report", action="store_true", help="only write the report")
    options = parser.parse_args()
    setup_logs()
    if not options.report:
        setup = Setup(dict(zip(EPOCHS, options.epochs, strict=True)), options.precision, options.count, options.device)
        prepare(options.out, options.device)
        todo = [
            (study, seed)
            for study, seed in in_order(options.seeds)
            if not is_complete(read_result(result_of(options.out, study, seed), setup.asked(study)))
        ]
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(run, options.out, study, seed, setup) for study, seed in todo]
            for number, future in enumerate(as_completed(waiting), start=1):
                fault = future.exception()
                log.info("%d of %d: %s", number, len(todo), fault or future.result().stem, exc_info=fault)
        faults = [future.exception() for future in waiting if future.exception()]
        if faults:
            raise SystemExit(f"{len(faults)} of {len(todo)} runs failed; the same command tries them again.")
    write_report(options.out)


if __name__ == "__main__":
    main()
