"""The paper's Tables 3, 4 and 5 in miniature: every kind of entity, cell size and context, on handwritten digits.

    python -m benchmarks.entities --out entities                           # many hours on two cores; can be interrupted
    python -m benchmarks.entities --out entities --device cuda --tables 4  # one table, compiled and in bf16
    python -m benchmarks.entities --out entities --device cuda --tables 4 --report  # write it into docs/entities.md

Every row is trained with the quickstart's network at equal compute: the floating-point operations of training are
counted from shapes, and a row whose image costs more takes fewer steps. Entities (Table 3) and contexts (Table 5) are
compared on the digits as they are, 8 x 8, in tokens of 2 x 2 pixels: a 4 x 4 grid. Cell sizes (Table 4) are compared
on the paper's 16 x 16 grid, so that its five sizes make its K = 256, 64, 16, 4 and 1: the digits are enlarged to
16 x 16, each pixel four equal ones, in tokens of one pixel; what is drawn is reduced to 8 x 8 again before it is
judged. Rows that are the same network are trained once. Each run is judged at several guidance scales by the `digits`
protocol. Seeds are made one after the other, so that a study that is interrupted has whole ones.

A table is made of results with one setting of `--epochs`, `--precision` and `--count`, those of the command, in as many
steps as it would take, judged at every scale of `--guidance`: `--report` needs them too. Device and compiler may
differ; the line under a table says it.

With `--report` alone tables are written: each between two marks of its own in docs/entities.md, with what made it and
a picture. What is written around them, and tables that were not asked for or have no results, are left alone. Of
`--out` a table needs `results/` alone, and its picture `samples/`: without the samples of one of its rows, the picture
stays as it is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.solvers import draw, judge, spread
from benchmarks.timing import command, positive
from xar_cli.cache.stage import cache_latents
from xar_cli.config import Config, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.digits import write_digits
from xar_cli.logs import log, setup_logs
from xar_cli.model import XAR, build_grouping
from xar_cli.run_dir import write_json
from xar_cli.sample.images import grid_image, image_path
from xar_cli.sample.manifest import MANIFEST
from xar_cli.sample.plan import SamplingPlan, flops_per_image
from xar_cli.train.cost import training_flops
from xar_cli.train.loop import TrainSettings, train
from xar_cli.train.plan import make_plan

REPORT = Path(__file__).resolve().parent.parent / "docs" / "entities.md"
PICTURE = "images/entities-table-{}.png"  # beside the report
MARKS = ("<!-- table {}: made by benchmarks/entities.py -->", "<!-- end of table {} -->")
TRAINING = ("train.checkpoint_every=500", "train.keep_last=1", "train.log_every=100")
SAMPLING = ("sample.solver=multistep", "sample.num_steps=10")
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
JOBS = {"cpu": 2, "cuda": 6}  # networks at a time, by device
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
COMPILE_THREADS = 2  # of each network: all of them compile at the same time, on the same cores
DIGIT_SIDE = 8  # pixels of a scan, and of what the protocol judges
PICTURED_SEED, PICTURED = 0, 2  # whose samples are kept, and how many of each class


class Grid(NamedTuple):
    """How a digit becomes tokens: side of the image and of a token, in pixels."""

    side: int
    patch: int

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


class Table(NamedTuple):
    """One table of the paper."""

    title: str
    rows: tuple[Row, ...]


def cell(size: int) -> str:
    """The entity of square cells."""
    return f"{{kind: cell, size: {size}}}"


SMALL, LARGE = Grid(side=8, patch=2), Grid(side=16, patch=1)
YARDSTICKS = {SMALL: Study(SMALL, cell(2)), LARGE: Study(LARGE, cell(8))}  # K = 4, the paper's choice
EPOCHS = {SMALL: 60.0, LARGE: 120.0}  # of the yardstick
TABLES = {
    3: Table(
        "what X is",
        (
            Row("entity-token", "token", Study(SMALL, "{kind: token}")),
            Row("entity-subsample", "subsample, stride 2", Study(SMALL, "{kind: subsample, stride: 2}")),
            Row("entity-image", "image", Study(SMALL, "{kind: image}")),
            Row("entity-scale", "scale, 1 2 4", Study(SMALL, "{kind: scale, sizes: [1, 2, 4]}")),
            Row("entity-cell", "cell, 2 x 2", Study(SMALL, cell(2))),
        ),
    ),
    4: Table(
        "size of the cell",
        tuple(Row(f"cell-{size}", f"{size} x {size}", Study(LARGE, cell(size))) for size in (1, 2, 4, 8, 16)),
    ),
    5: Table(
        "context while training",
        (
            Row("context-clean", "clean", Study(SMALL, cell(2), "clean")),
            Row("context-increasing", "increasing", Study(SMALL, cell(2), "increasing")),
            Row("context-decreasing", "decreasing", Study(SMALL, cell(2), "decreasing")),
            Row("context-random", "random", Study(SMALL, cell(2))),
        ),
    ),
}


def studies_of(numbers: Iterable[int]) -> tuple[Study, ...]:
    """The networks of some tables, each once."""
    return tuple(dict.fromkeys(row.study for number in numbers for row in TABLES[number].rows))


class Setup(NamedTuple):
    """What all runs have in common: epochs of the yardsticks, arithmetic, images at each guidance scale, device."""

    epochs: dict[Grid, float]
    precision: str = "fp32"
    images: int = 1000
    device: str = "cpu"
    compiled: bool = False  # training; sampling follows the recipe
    guidance: tuple[float, ...] = GUIDANCE

    def asked(self, study: Study) -> dict[str, Any]:
        """What a result must have been made with to count as this setup's; device and compiler may be others."""
        return {"epochs": self.epochs[study.grid], "precision": self.precision, "images": self.images}

    @property
    def options(self) -> str:
        """Those options of the command that decide which results make a table."""
        epochs, guidance = (" ".join(f"{one:g}" for one in many) for many in (self.epochs.values(), self.guidance))
        return f"--epochs {epochs} --precision {self.precision} --count {self.images} --guidance {guidance}"


DEFAULTS = Setup(EPOCHS)


def recipe_of(study: Study, seed: int = 0, setup: Setup = DEFAULTS) -> Config:
    """The recipe of a study, with the epochs that its compute allows."""
    grid, yardstick = study.grid, YARDSTICKS[study.grid]
    base = [
        f"data.image_size={grid.side}", f"tokenizer.patch={grid.patch}", f"train.seed={seed}",
        f"train.precision={setup.precision}", f"train.compile={str(setup.compiled).lower()}", *TRAINING, *SAMPLING,
    ]  # fmt: skip
    if setup.device != "cpu":  # a small network waits for its launches: the fewer batches the better
        base += [f"sample.batch_size={setup.images}", "sample.compile=false"]  # 512 CUDA graphs for 10 uses: too many

    def build(study: Study, epochs: float) -> Config:
        changes = [f"entity={study.entity}", f"train.context={study.context}", f"train.epochs={epochs}"]
        return load_recipe("tiny", [*base, *changes])

    share = flops_of_training(build(yardstick, 1)) / flops_of_training(build(study, 1))
    return build(study, round(setup.epochs[grid] * share, 3))


def steps_of(study: Study, setup: Setup = DEFAULTS) -> int:
    """Optimizer steps of a study."""
    config = recipe_of(study, setup=setup)
    return make_plan(config, 1, config.data.num_images).total_steps


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


def run_of(out: Path, study: Study, seed: int, setup: Setup) -> Path:
    """The run folder of a network, named by all that one must have in common with it to go on from there."""
    words = [f"{study.slug}-seed{seed}", f"{setup.epochs[study.grid]:g}epochs", setup.precision]
    return out / "runs" / "-".join([*words, *(["compiled"] if setup.compiled else [])])


def samples_of(out: Path, study: Study, seed: int, scale: float) -> Path:
    """Where the images of a run are drawn."""
    return out / "samples" / f"{study.slug}-seed{seed}-guidance{scale:g}"


def run(out: Path, study: Study, seed: int, setup: Setup) -> Path:
    """Train one network and judge it; goes on from its checkpoint where it was stopped."""
    torch.set_num_threads(1)
    if setup.compiled:
        torch.compiler.reset()  # the graphs of the network before, of another shape, count against torch's limit
    config, folder = recipe_of(study, seed, setup), run_of(out, study, seed, setup)
    path, asked = result_of(out, study, seed), setup.asked(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read_result(path)
    if not folder.exists() or not is_of_network(before, study, setup):
        before = {}
    done = train(TrainSettings(config=config, data=cache_of(out, study.grid), out=folder, device=setup.device))
    result = {
        "steps": done["steps"],
        "loss": done["loss"],
        "seconds": before.get("seconds", 0.0) + done["seconds"],  # of a finished run that is judged again: nearly none
        "device": torch.cuda.get_device_name(setup.device) if setup.device != "cpu" else "CPU",
        "torch": torch.__version__,
        "compiled": setup.compiled,
        "asked": asked,
        "guidance": before.get("guidance", {}) if before.get("asked") == asked else {},
    }
    write_json(path, result)
    for scale in setup.guidance:
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
    return result if asked in (None, result.get("asked")) else {}


def is_of_network(result: dict[str, Any], study: Study, setup: Setup) -> bool:
    """Whether a result speaks of the network in this setup's run folder, judged on however many images."""
    asked, ours = result.get("asked", {}), setup.asked(study)
    same = all(asked.get(key) == ours[key] for key in ("epochs", "precision"))
    return same and result.get("compiled") == setup.compiled


def is_complete(result: dict[str, Any], guidance: tuple[float, ...] = GUIDANCE) -> bool:
    """Whether a run was judged at all these guidance scales."""
    return all(f"{scale:g}" in result.get("guidance", {}) for scale in guidance)


def in_order(studies: Iterable[Study], seeds: int) -> list[tuple[Study, int]]:
    """All runs: seed by seed, of one seed the longest first, so that no process is left alone with one at the end."""

    def entities(study: Study) -> int:
        config = recipe_of(study)
        return int(build_grouping(config.entity, config.grid).num_entities)

    ordered = sorted(studies, key=lambda study: (-study.grid.side, -entities(study)))
    return [(study, seed) for seed in range(seeds) for study in ordered]


def prepare(out: Path, grids: Iterable[Grid], device: str) -> None:
    """The digits, and a latent cache of them for each grid."""
    images, _ = write_digits(out / "digits")
    for grid in grids:
        if not cache_of(out, grid).exists():
            enlarged = resized(images, images.with_name(f"train-{grid.side}px"), enlarge, grid.enlarged)
            cache_latents(enlarged, cache_of(out, grid), recipe_of(YARDSTICKS[grid]), device=device, flip="none")


def run_all(out: Path, studies: Iterable[Study], seeds: int, setup: Setup, jobs: int) -> None:
    """Make what is missing, some networks at a time, each in a process with one CPU thread."""
    todo = [
        (study, seed)
        for study, seed in in_order(studies, seeds)
        if not is_complete(read_result(result_of(out, study, seed), setup.asked(study)), setup.guidance)
    ]
    prepare(out, dict.fromkeys(study.grid for study, _ in todo), setup.device)
    if setup.compiled:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(COMPILE_THREADS))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run, out, study, seed, setup) for study, seed in todo]
        for number, future in enumerate(as_completed(waiting), start=1):
            fault = future.exception()
            log.info("%d of %d: %s", number, len(todo), fault or future.result().stem, exc_info=fault)
    faults = [future.exception() for future in waiting if future.exception()]
    if faults:
        raise SystemExit(f"{len(faults)} of {len(todo)} runs failed; the same command tries them again.")


class Found(NamedTuple):
    """What is known of a study: the guidance scale with the lowest mean distance, and the numbers there, by seed."""

    scale: float
    distances: list[float]
    accuracies: list[float]
    unguided: list[float]
    results: dict[int, dict[str, Any]]


def result_files(out: Path, study: Study) -> dict[int, Path]:
    """The results of a study that are there, however they were made, by seed."""
    paths = sorted((out / "results").glob(f"{study.slug}-seed*.json"))
    return {int(path.stem.rpartition("seed")[2]): path for path in paths}


def results_of(out: Path, study: Study, setup: Setup = DEFAULTS) -> dict[int, dict[str, Any]]:
    """The results of a study, by seed, that are complete for the guidance scales and were made as asked, in as many
    steps as the recipe takes now.
    """
    results = {seed: read_result(path, setup.asked(study)) for seed, path in result_files(out, study).items()}
    whole = {seed: result for seed, result in results.items() if is_complete(result, setup.guidance)}
    steps = steps_of(study, setup) if whole else 0
    return {seed: result for seed, result in whole.items() if result["steps"] == steps}


def left_out(out: Path, number: int, setup: Setup = DEFAULTS) -> list[Path]:
    """Results for a table that it does not use: made otherwise, or not judged at all guidance scales."""
    return [
        path
        for study in studies_of([number])
        for seed, path in result_files(out, study).items()
        if seed not in results_of(out, study, setup)
    ]


def found_of(out: Path, study: Study, setup: Setup = DEFAULTS) -> Found | None:
    """What the results of all seeds so far say."""
    results = results_of(out, study, setup)
    if not results:
        return None

    def at(scale: float, place: int) -> list[float]:
        judged = [result["guidance"].get(f"{scale:g}") for result in results.values()]
        return [numbers[place] for numbers in judged if numbers]

    best = min(setup.guidance, key=lambda scale: statistics.mean(at(scale, 0)))
    return Found(best, at(best, 0), at(best, 1), at(1.0, 0), results)


def table(out: Path, number: int, setup: Setup = DEFAULTS) -> str:
    """One table in Markdown; empty without a result."""
    lines = []
    for row in TABLES[number].rows:
        found = found_of(out, row.study, setup)
        if found is None:
            continue
        config = override(recipe_of(row.study), [f"sample.guidance_scale={found.scale}"])
        plan, published = SamplingPlan.of(config), load_recipe(f"ablations/{row.recipe}").published
        steps = steps_of(row.study, setup)
        assert published is not None
        lines.append(
            f"| {row.label} | {row.label.split(',')[0]} | {len(plan.num_steps)} "
            f"| {steps:,} | {spread(found.distances)} | {found.scale:g} | {spread(found.unguided)} "
            f"| {spread(found.accuracies, 3)} | {len(found.results)} "
            f"| {plan.evaluations().total}, {flops_per_image(config, plan) / 1e9:.2f} | {published.fid:.2f} |"
        )
    if not lines:
        return ""
    head = [
        f"### Table {number}: {TABLES[number].title}\n",
        "| here | paper | K | steps | Fréchet distance | at guidance | unguided | class accuracy | seeds "
        "| evaluations, GFLOP an image | paper's FID |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + lines)


def circumstances(out: Path, number: int, setup: Setup = DEFAULTS) -> str:
    """What the networks of a table were made with and how long training took."""
    results = [result for study in studies_of([number]) for result in results_of(out, study, setup).values()]

    def every(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    def arithmetic(result: dict[str, Any]) -> str:
        return str(result["asked"]["precision"]) + (" compiled" if result["compiled"] else "")

    seconds = [result["seconds"] for result in results]
    return (
        f"{len(results)} networks, with `--tables {number} {setup.options}`. "
        f"Device: {every(result['device'] for result in results)}; torch "
        f"{every(result['torch'] for result in results)}; trained in {every(map(arithmetic, results))}. "
        f"Training took {min(seconds):.0f} to {max(seconds):.0f} seconds a network while others shared the device, "
        f"{sum(seconds) / 60:.0f} minutes if they are added up."
    )


def samples_to_picture(out: Path, number: int, setup: Setup = DEFAULTS) -> dict[str, Path]:
    """The samples of each row of a table, by its label: of one seed at the best guidance scale of all."""
    samples = {}
    for row in TABLES[number].rows:
        found = found_of(out, row.study, setup)
        if found is not None and PICTURED_SEED in found.results:
            samples[row.label] = samples_of(out, row.study, PICTURED_SEED, found.scale)
    return samples


def save_picture(samples: Iterable[Path], path: Path) -> None:
    """A row of digits for each of these folders of samples."""
    images = []
    for file in (file for folder in samples for file in pictured(folder)):
        with Image.open(file) as image:
            images.append(image.resize((32, 32), Image.Resampling.BICUBIC))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = grid_image(images, 10 * PICTURED, gap=1)
    size = (picture.width // 2, picture.height // 2)
    picture.resize(size, Image.Resampling.LANCZOS).quantize(64).save(path)


def picture_of(out: Path, number: int, setup: Setup, former: list[str]) -> list[str]:
    """The paragraphs of a table's picture, which is made anew; the former ones where samples of a row are missing."""
    samples, picture = samples_to_picture(out, number, setup), PICTURE.format(number)
    missing = [folder.name for folder in samples.values() if not (folder / MANIFEST).exists()]
    if missing or not samples:
        log.info("Table %d: its picture stays as it is; missing: %s", number, ", ".join(missing) or "its samples")
        return [paragraph for paragraph in former if paragraph.startswith(("![", "*"))]
    save_picture(samples.values(), REPORT.parent / picture)
    return [
        f"![Generated digits of Table {number}, a row for each network]({picture})",
        f"*From top to bottom: {'; '.join(samples)}.*",
    ]


def section(out: Path, number: int, setup: Setup, former: list[str]) -> list[str]:
    """The paragraphs of a table: itself, what made it, its picture; none without a result."""
    rows = table(out, number, setup)
    return [rows, circumstances(out, number, setup), *picture_of(out, number, setup, former)] if rows else []


def write_report(out: Path, numbers: Iterable[int] = tuple(TABLES), setup: Setup = DEFAULTS) -> None:
    """Put tables between their marks in docs/entities.md, of results made as asked; one without any stays as it is."""
    text = REPORT.read_text(encoding="utf-8")
    for number in numbers:
        begin, end = (mark.format(number) for mark in MARKS)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{REPORT} must hold {begin} and {end} once each, around the place of the table.")
        others = left_out(out, number, setup)
        if others:
            names = ", ".join(path.stem for path in others)
            log.info("Table %d: not made with %s, so left out: %s", number, setup.options, names)
        before, _, rest = text.partition(begin)
        former, _, after = rest.partition(end)
        paragraphs = section(out, number, setup, former.split("\n\n"))
        if not paragraphs:
            log.info("Table %d has no results and stays as it is.", number)
            continue
        text = before + "\n\n".join([begin, *paragraphs, end]) + after
    REPORT.write_text(text, encoding="utf-8")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("entities"))
    parser.add_argument(
        "--tables", type=int, nargs="+", choices=tuple(TABLES), default=list(TABLES),
        help="which are made, or written (default: all)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--count", type=positive, default=1000, help="images drawn at each guidance scale")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=list(GUIDANCE), metavar="SCALE",
        help="scales that every network is judged at; the best one counts (default: 1 1.5 2 3)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=float, nargs=len(EPOCHS), default=list(EPOCHS.values()), metavar=("4x4", "16x16"),
        help="epochs of the K = 4 cell on each grid of tokens; the other rows follow by compute (default: 60 120)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), help="arithmetic of all networks (default: fp32; cuda: bf16)"
    )
    parser.add_argument("--device", choices=tuple(JOBS), default="cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile training (default: on cuda only)"
    )
    parser.add_argument("--jobs", type=positive, help="networks at a time, one CPU thread each (default: 2; cuda: 6)")
    parser.add_argument("--report", action="store_true", help="write the tables; nothing is trained")
    options = parser.parse_args()
    setup_logs()
    device = options.device
    setup = Setup(
        epochs=dict(zip(EPOCHS, options.epochs, strict=True)),
        precision=options.precision or PRECISION[device],
        images=options.count,
        device=device,
        compiled=device == "cuda" if options.compile is None else options.compile,
        guidance=tuple(options.guidance),
    )
    if options.report:
        write_report(options.out, options.tables, setup)
    else:
        run_all(options.out, studies_of(options.tables), options.seeds, setup, options.jobs or JOBS[device])


if __name__ == "__main__":
    main()
