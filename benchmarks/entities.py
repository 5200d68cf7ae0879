"""The paper's Tables 3, 4 and 5 in miniature: every kind of entity, cell size and context, on handwritten digits.

    python -m benchmarks.entities --out entities            # some hours on two cores; goes on where it stopped
    python -m benchmarks.entities --out entities --report   # only write docs/entities.md from what is there

Every row is trained with the quickstart's network at equal compute: the floating-point operations of training are
counted from shapes, and a row whose image costs more takes fewer steps. Entities (Table 3) and contexts (Table 5) are
compared on tokens of 2 x 2 pixels, a 4 x 4 grid; cell sizes (Table 4) on tokens of one pixel, an 8 x 8 grid, whose four
squares make K = 64, 16, 4 and 1 entities, as the paper's sizes 2 to 16 do on its grid. Rows that are the same network
are trained once. Each run is judged at several guidance scales by the `digits` protocol.

The tables go between two marks in docs/entities.md; what is written around them is left alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.solvers import measure
from xar_cli.cache.stage import cache_latents
from xar_cli.config import Config, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.digits import write_digits
from xar_cli.evaluate import evaluate
from xar_cli.logs import log, setup_logs
from xar_cli.model import XAR
from xar_cli.run_dir import write_json
from xar_cli.sample.images import grid_image, image_path
from xar_cli.sample.manifest import MANIFEST
from xar_cli.sample.plan import SamplingPlan, flops_per_image
from xar_cli.train.cost import training_flops
from xar_cli.train.loop import TrainSettings, train

REPORT = Path(__file__).resolve().parent.parent / "docs" / "entities.md"
PICTURE = Path("images") / "entities.png"  # beside the report
MARKS = ("<!-- made by benchmarks/entities.py -->", "<!-- end -->")
SAMPLING = ("sample.solver=multistep", "sample.num_steps=10")
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
CELLS_2, CELLS_4 = "{kind: cell, size: 2}", "{kind: cell, size: 4}"
EPOCHS = {2: 60, 1: 30}  # of the yardstick row, by side of a token in pixels
YARDSTICK = {2: CELLS_2, 1: CELLS_4}  # K = 4, the paper's choice


class Study(NamedTuple):
    """One network to train: side of a token in pixels, entity, context."""

    patch: int
    entity: str
    context: str = "random"

    @property
    def slug(self) -> str:
        """A name for files."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.entity.removeprefix("{kind:")).split()
        return "-".join([f"patch{self.patch}", *words, self.context])


class Row(NamedTuple):
    """One row of a table: the paper's recipe, and its miniature."""

    recipe: str
    label: str
    study: Study


TABLES = {
    "Table 3: what X is": (
        Row("entity-token", "token", Study(2, "{kind: token}")),
        Row("entity-subsample", "subsample, stride 2", Study(2, "{kind: subsample, stride: 2}")),
        Row("entity-image", "image", Study(2, "{kind: image}")),
        Row("entity-scale", "scale, 1 2 4", Study(2, "{kind: scale, sizes: [1, 2, 4]}")),
        Row("entity-cell", "cell, 2 x 2", Study(2, CELLS_2)),
    ),
    "Table 4: size of the cell": (
        Row("cell-2", "1 x 1", Study(1, "{kind: cell, size: 1}")),
        Row("cell-4", "2 x 2", Study(1, "{kind: cell, size: 2}")),
        Row("cell-8", "4 x 4", Study(1, CELLS_4)),
        Row("cell-16", "8 x 8", Study(1, "{kind: cell, size: 8}")),
    ),
    "Table 5: context while training": (
        Row("context-clean", "clean", Study(2, CELLS_2, "clean")),
        Row("context-increasing", "increasing", Study(2, CELLS_2, "increasing")),
        Row("context-decreasing", "decreasing", Study(2, CELLS_2, "decreasing")),
        Row("context-random", "random", Study(2, CELLS_2)),
    ),
}
PAPER_LABELS = {"cell-2": "2 x 2", "cell-4": "4 x 4", "cell-8": "8 x 8", "cell-16": "16 x 16"}
STUDIES = tuple(dict.fromkeys(row.study for rows in TABLES.values() for row in rows))


def recipe_of(study: Study, seed: int) -> Config:
    """The recipe of a study, with the epochs that its compute allows."""
    base = [f"tokenizer.patch={study.patch}", f"train.seed={seed}", "train.checkpoint_every=200", *SAMPLING]

    def build(entity: str, context: str, epochs: float) -> Config:
        return load_recipe("tiny", [*base, f"entity={entity}", f"train.context={context}", f"train.epochs={epochs}"])

    yardstick = build(YARDSTICK[study.patch], "random", EPOCHS[study.patch])
    here = build(study.entity, study.context, 1)
    allowed = EPOCHS[study.patch] * flops_of_training(yardstick) / flops_of_training(here)
    return build(study.entity, study.context, round(allowed, 3))


def flops_of_training(config: Config) -> float:
    """FLOP of one image's forward and backward pass."""
    with torch.device("meta"):
        return training_flops(config, XAR(config))


def cache_of(out: Path, patch: int) -> Path:
    """The latent cache of the digits for a size of token."""
    return out / f"latents-patch{patch}.h5"


def result_of(out: Path, study: Study, seed: int) -> Path:
    """Where the result of a run is written."""
    return out / "results" / f"{study.slug}-seed{seed}.json"


def samples_of(out: Path, study: Study, seed: int, scale: float) -> Path:
    """Where the images of a run are drawn."""
    return out / "samples" / f"{study.slug}-seed{seed}-guidance{scale:g}"


def run(out: Path, study: Study, seed: int, count: int) -> Path:
    """Train one network and judge it; goes on from its checkpoint where it was stopped."""
    torch.set_num_threads(1)
    config, folder = recipe_of(study, seed), out / "runs" / f"{study.slug}-seed{seed}"
    done = train(TrainSettings(config=config, data=cache_of(out, study.patch), out=folder, device="cpu"))
    path = result_of(out, study, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = guidance_of(path, count)
    for scale in GUIDANCE:
        if f"{scale:g}" in found:
            continue
        guided = override(config, [f"sample.guidance_scale={scale}"])
        samples = samples_of(out, study, seed, scale)
        found[f"{scale:g}"] = measure(guided, folder, out / "digits" / "train", samples, count, seed)
        write_json(path, {"steps": done["steps"], "loss": done["loss"], "guidance": found, "count": count})
    return path


def guidance_of(result: Path, count: int | None = None) -> dict[str, Any]:
    """Distance and accuracy at each guidance scale that a run was judged at so far, with so many images."""
    if not result.exists():
        return {}
    found = json.loads(result.read_text(encoding="utf-8"))
    return dict(found["guidance"]) if count in (None, found["count"]) else {}


def is_complete(result: Path, count: int | None = None) -> bool:
    """Whether a run was judged at every guidance scale."""
    return all(f"{scale:g}" in guidance_of(result, count) for scale in GUIDANCE)


def in_order(seeds: int) -> list[tuple[int, Study]]:
    """All runs: the large grid, which costs more, comes after the small one."""
    runs = [(seed, study) for seed in range(seeds) for study in STUDIES]
    return sorted(runs, key=lambda run: run[0] + (0.5 if run[1].patch == 1 else 0))


def prepare(out: Path) -> None:
    """The digits, and a latent cache of them for each size of token."""
    images, _ = write_digits(out / "digits")
    for patch in EPOCHS:
        if not cache_of(out, patch).exists():
            cache_latents(images, cache_of(out, patch), recipe_of(Study(patch, YARDSTICK[patch]), 0), flip="none")


class Found(NamedTuple):
    """What is known of a study: the guidance scale with the lowest mean distance, and the numbers there, by seed."""

    scale: float
    distances: list[float]
    accuracies: list[float]
    unguided: list[float]
    seeds: list[int]


def found_of(out: Path, study: Study) -> Found | None:
    """The results of all seeds so far."""
    results = {
        int(path.stem.rpartition("seed")[2]): guidance_of(path)
        for path in sorted((out / "results").glob(f"{study.slug}-seed*.json"))
        if is_complete(path)
    }
    if not results:
        return None

    def at(scale: float, place: int) -> list[float]:
        return [result[f"{scale:g}"][place] for result in results.values()]

    best = min(GUIDANCE, key=lambda scale: statistics.mean(at(scale, 0)))
    return Found(best, at(best, 0), at(best, 1), at(1.0, 0), list(results))


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
        config = override(recipe_of(row.study, 0), [f"sample.guidance_scale={found.scale}"])
        plan, published = SamplingPlan.of(config), load_recipe(f"ablations/{row.recipe}").published
        result = json.loads(result_of(out, row.study, found.seeds[0]).read_text(encoding="utf-8"))
        assert published is not None
        lines.append(
            f"| {row.label} | {PAPER_LABELS.get(row.recipe, row.label.split(',')[0])} | {len(plan.num_steps)} "
            f"| {result['steps']:,} | {spread(found.distances)} | {found.scale:g} | {spread(found.unguided)} "
            f"| {spread(found.accuracies, 3)} | {len(found.seeds)} "
            f"| {plan.evaluations().total}, {flops_per_image(config, plan) / 1e9:.2f} | {published.fid} |"
        )
    return "\n".join(lines)


def yardsticks(out: Path) -> str:
    """What the distance is for real held-out digits."""
    found = evaluate(out / "digits" / "heldout", out / "digits" / "train", "digits")
    return (
        f"The {found.samples.count} real held-out digits have a Fréchet distance of {found.frechet_distance:.2f} to "
        "the same reference; so few images raise it a little, beside those of the table."
    )


def save_picture(out: Path, path: Path) -> None:
    """A row of digits for each study, two of each class, from the first seed at its best guidance scale."""
    images = []
    for study in STUDIES:
        found = found_of(out, study)
        if found is None:
            continue
        folder = samples_of(out, study, found.seeds[0], found.scale)
        labels = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["labels"]
        places = [index for label in range(10) for index in [i for i, other in enumerate(labels) if other == label][:2]]
        for place in places:
            with Image.open(image_path(folder, place)) as image:
                images.append(image.resize((32, 32), Image.Resampling.BICUBIC))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = grid_image(images, 20, gap=1)
    picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS).quantize(64).save(path)


def write_report(out: Path) -> None:
    """Put the tables between the marks of docs/entities.md."""
    text = REPORT.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise SystemExit(f"{REPORT} must hold {' and '.join(MARKS)} once each, around the place of the tables.")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    rows = "; ".join(
        f"{study.entity.strip('{}')}, {study.context}, {study.patch}-pixel tokens"
        for study in STUDIES
        if found_of(out, study)
    )
    parts = [
        MARKS[0], *(table(out, title, rows) for title, rows in TABLES.items()), yardsticks(out),
        f"![Generated digits, a row for each network]({PICTURE.as_posix()})", f"*From top to bottom: {rows}.*",
        MARKS[1],
    ]  # fmt: skip
    save_picture(out, REPORT.parent / PICTURE)
    REPORT.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("entities"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=1000, help="images drawn at each guidance scale")
    parser.add_argument("--jobs", type=int, default=2, help="networks trained at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="only write the report")
    options = parser.parse_args()
    setup_logs()
    if not options.report:
        prepare(options.out)
        todo: list[Any] = [
            (study, seed)
            for seed, study in in_order(options.seeds)
            if not is_complete(result_of(options.out, study, seed), options.count)
        ]
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(run, options.out, study, seed, options.count) for study, seed in todo]
            for number, future in enumerate(as_completed(waiting), start=1):
                fault = future.exception()
                log.info("%d of %d: %s", number, len(todo), fault or future.result().stem, exc_info=fault)
        faults = [future.exception() for future in waiting if future.exception()]
        if faults:
            raise SystemExit(f"{len(faults)} of {len(todo)} runs failed; the same command tries them again.")
    write_report(options.out)


if __name__ == "__main__":
    main()
