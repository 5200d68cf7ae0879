"""The report of an evaluation: what goes into it, as report.json and report.md; report.html is made by html.py.

Owns the content. The schema of report.json is in docs/evaluation.md.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xar_cli import __version__
from xar_cli.config import load_recipe, published_result
from xar_cli.config.recipes import validate
from xar_cli.config.schema import height_and_width, pixels_text, sides_text
from xar_cli.errors import UserError
from xar_cli.evaluate import html, metrics
from xar_cli.evaluate.evaluation import Settings
from xar_cli.evaluate.images import FolderImages, ImageSet
from xar_cli.evaluate.protocols import PAPER_COUNT
from xar_cli.evaluate.reference import Reference, open_reference
from xar_cli.evaluate.results import Evaluation
from xar_cli.run_dir import write_atomic, write_json

REPORT_FORMAT, REPORT_VERSION = "xar-report", 1
MAX_CLASSES_SHOWN, IMAGES_PER_CLASS, IMAGES_WITHOUT_CLASSES = 12, 8, 64
SAMPLES_WITH_NEIGHBOURS, NEIGHBOURS = 8, 4
MANIFEST_KEYS = (
    "recipe",
    "weights",
    "weights_sha256",
    "ema",
    "seed",
    "solver",
    "num_steps",
    "guidance_scale",
    "image_size",
)
PUBLISHED_KEYS = {  # key of a metric -> field of the recipe's published results
    "fid": "fid", "is": "inception_score", "precision": "precision", "recall": "recall",
}  # fmt: skip
COMPARED = {  # key of the recipe -> what it is, where it differs from the recipe that the published figures are of
    "sample.solver": "Solver",
    "sample.num_steps": "Steps",
    "sample.guidance_scale": "Guidance scale",
    "sample.guidance_schedule": "Guidance schedule",
    "sample.guidance_interval": "Guidance interval",
    "sample.decoder_precision": "Precision of the decoder",
    "train.precision": "Precision of the network",
}


@dataclass(frozen=True)
class Strip:
    """Some images side by side.

    Attributes:
        caption: what they are.
        images: (H, W, 3) uint8 each, of one size.
    """

    caption: str
    images: Sequence[np.ndarray]


def write_report(
    folder: Path,
    evaluation: Evaluation,
    made: Mapping[str, Any],
    samples: ImageSet,
    reference: Path | ImageSet | Reference,
    settings: Settings,
) -> dict[str, Path]:
    """Write report.json, report.md and report.html into a folder; returns their paths by kind.

    The numbers are written before images are read or drawn for the pictures of report.html.
    """
    content = report_content(evaluation, made, settings)
    paths = {kind: folder / f"report.{kind}" for kind in ("json", "md", "html")}
    write_json(paths["json"], content)
    write_atomic(paths["md"], markdown(content).encode(errors="backslashreplace"))  # names may be no UTF-8
    strips = sample_strips(samples, evaluation)
    neighbours = neighbour_strips(samples, reference, evaluation, settings)
    write_atomic(paths["html"], html.page(content, strips, neighbours).encode(errors="backslashreplace"))
    return paths


def facts_of_sampling(samples: ImageSet) -> dict[str, Any]:
    """What the report says of how the samples were made, from their manifest; known before anything is measured."""
    manifest = samples.manifest or {}
    return {
        "published": published_figures(manifest),
        "sampling": {key: manifest[key] for key in MANIFEST_KEYS if key in manifest},
        "cost": dict(manifest.get("evaluations") or {}),
        "differences": differences_of_sampling(samples),
    }


def report_content(evaluation: Evaluation, made: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """All that the report says, as plain values; `made` is from `facts_of_sampling`."""
    return {
        "format": REPORT_FORMAT,
        "version": REPORT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **evaluation.as_dict(),
        **made,
        "differences": [*differences(evaluation), *made["differences"]],
        "settings": settings.model_dump(mode="json"),
        "machine": machine(),
    }


def published_figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's figures for the recipe of the samples, by the keys of our metrics; empty where it has none.

    Nor has a recipe that was changed in what is trained; one that is only drawn otherwise is compared.
    """
    try:
        published = published_result(validate(manifest.get("config") or {}, "The recipe of the samples"))
    except UserError:  # none, or one of another version
        return {}
    figures = {} if published is None else published.model_dump(exclude_none=True)
    found = {key: figures[field] for key, field in PUBLISHED_KEYS.items() if field in figures}
    return {**found, "source": figures["source"], "recipe": manifest.get("recipe", "")} if found else {}


def differences(evaluation: Evaluation) -> list[str]:
    """What keeps our numbers from comparing directly with published ones, in sentences; empty where nothing does."""
    found = []
    if evaluation.samples.count != PAPER_COUNT:
        found.append(
            f"Count: {evaluation.samples.count} samples here, {PAPER_COUNT} in papers. The Frechet distance of fewer "
            "samples is biased upward."
        )
    if "adm" not in evaluation.results:
        found.append("Protocol: papers use ADM's suite; this is " + " and ".join(evaluation.results) + ".")
    found.append(
        f"Reference: '{evaluation.reference.name}' (sha256 {evaluation.reference.sha256[:12]}...). Papers use ADM's "
        "statistics of the ImageNet training set."
    )
    for result in evaluation.results.values():
        if not result.published_weights:
            found.append(f"Weights: the network '{result.network}' of {result.protocol} is not the published one.")
        if result.precision != "fp32":
            found.append(f"Precision: {result.protocol} ran in {result.precision}, which shifts its numbers.")
    return found


def differences_of_sampling(samples: ImageSet) -> list[str]:
    """The same of how the samples were drawn: a sentence each, where published figures stand beside ours."""
    manifest, found = samples.manifest or {}, []
    crop = samples.image_size if isinstance(samples, FolderImages) else None
    drawn_size = manifest.get("image_size")
    if crop is not None and (drawn_size is None or height_and_width(crop) != height_and_width(drawn_size)):
        found.append(f"Crop: the samples were cropped to {sides_text(crop)} by --image-size.")
    if not published_figures(manifest):
        return found
    ours = validate(manifest["config"], "The recipe of the samples")
    theirs = load_recipe(ours.name)
    for key, what in COMPARED.items():
        section, _, name = key.partition(".")
        here, there = (_plain(getattr(getattr(config, section), name)) for config in (ours, theirs))
        if here != there:
            found.append(f"{what}: {here} here, {there} in the recipe that the published figures are of.")
    if manifest.get("ema") is False:
        found.append("Weights: the raw ones of training, not their average (EMA).")
    drawn, classes = len(set(manifest.get("labels") or [])), ours.data.num_classes
    if drawn < classes:
        found.append(f"Classes: {drawn} of {classes} were drawn; published figures are of all of them.")
    return found


def machine() -> dict[str, Any]:
    """What computed this."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "xar": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def sample_strips(samples: ImageSet, evaluation: Evaluation) -> list[Strip]:
    """A strip for each class, at most twelve classes spread over all; one grid where there are no classes."""
    table = next(iter(evaluation.tables.values()))
    if samples.labels is None:
        return _strips(samples, {"the first samples": table.rows[:IMAGES_WITHOUT_CLASSES]})
    labels = samples.labels[table.rows]
    classes = np.unique(labels)
    shown = classes[np.linspace(0, len(classes) - 1, min(len(classes), MAX_CLASSES_SHOWN)).round().astype(int)]
    return _strips(
        samples,
        {samples.class_caption(int(label)): table.rows[labels == label][:IMAGES_PER_CLASS] for label in shown},
    )


def neighbour_strips(
    samples: ImageSet, reference: Path | ImageSet | Reference, evaluation: Evaluation, settings: Settings
) -> list[Strip]:
    """Some samples, each followed by the real images nearest to it in feature space; none without real images."""
    name = next(iter(evaluation.tables))
    real = open_reference(reference, settings.image_size).images
    if name not in evaluation.reference_tables or real is None:
        return []
    table, real_table = evaluation.tables[name], evaluation.reference_tables[name]
    picked = np.linspace(0, len(table) - 1, min(len(table), SAMPLES_WITH_NEIGHBOURS)).round().astype(int)
    found = metrics.nearest(table.layers["pool"][picked], real_table.layers["pool"], NEIGHBOURS)
    own = _strips(samples, {f"sample {row}": [row] for row in table.rows[picked]})
    near = _strips(real, {str(place): real_table.rows[rows] for place, rows in enumerate(found)})
    strips = []
    for mine, theirs in zip(own, near, strict=True):
        side = mine.images[0].shape
        alike = [image for image in theirs.images if image.shape == side]
        strips.append(Strip(f"{mine.caption}, then its {len(alike)} nearest real images", [*mine.images, *alike]))
    return strips


def _strips(images: ImageSet, rows: Mapping[str, Sequence[int] | np.ndarray]) -> list[Strip]:
    """Strips of the given images by caption; a generator draws them together."""
    wanted = [int(row) for some in rows.values() for row in some]
    loaded = iter(images.load_many(wanted))
    return [Strip(caption, [next(loaded) for _ in some]) for caption, some in rows.items()]


def markdown(content: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {title(content)}", "", *(f"- {side}: {text}" for side, text in what_was_measured(content)), ""]
    for name, result in content["protocols"].items():
        lines += [f"## {name}", "", result["description"] + ".", ""]
        lines += ["| metric | value | published | what else |", "|---|---|---|---|"]
        lines += [_row(cells) for cells in metric_rows(result, content["published"])]
        lines.append("")
        if result["per_class"]:
            lines += ["| class | images | accuracy |", "|---|---|---|"]
            lines += [
                _row((label, str(found["count"]), f"{found['accuracy']:.3f}"))
                for label, found in result["per_class"].items()
            ]
            lines.append("")
    lines += ["## What differs from published numbers", "", *(f"- {text}" for text in content["differences"]), ""]
    for heading, facts in fact_tables(content):
        lines += [f"## {heading}", "", "| | |", "|---|---|", *map(_row, facts), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table, whatever stands in its cells."""
    safe = [" ".join(cell.splitlines()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(safe)} |"


def title(content: Mapping[str, Any]) -> str:
    """One line that names the report."""
    recipe = content["sampling"].get("recipe")
    return f"Evaluation of {recipe}" if recipe else f"Evaluation of {Path(content['samples']['name']).name}"


def what_was_measured(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Samples and reference, in words."""
    found = []
    for side in ("samples", "reference"):
        facts = content[side]
        size = f", {pixels_text(facts['image_size'])}" if facts["image_size"] else ""
        counted = f"{facts['count']} images" if facts["count"] else "statistics"
        skipped = f", {len(facts['skipped'])} left out as unreadable" if facts["skipped"] else ""
        found.append((side, f"{facts['name']}: {counted}{size}{skipped}, sha256 {facts['sha256'][:16]}"))
    return found


def metric_rows(result: Mapping[str, Any], published: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, value, published value and note of each metric of a protocol."""
    rows = []
    for key, metric in result["metrics"].items():
        theirs = f"{published[key]:g}" if result["protocol"] == "adm" and key in published else ""
        rows.append((metric["name"], show_number(metric["value"], metric["error"]), theirs, metric["note"]))
    return rows


def fact_tables(content: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The rest, as headed tables of key and value."""
    tables: list[tuple[str, list[tuple[str, str]]]] = []
    if content["sampling"]:
        tables.append(("How the samples were made", _pairs(content["sampling"])))
    if content["cost"]:
        tables.append(("Cost of one image, in network evaluations", _pairs(content["cost"])))
    networks = [
        (
            name,
            f"{result['network']}, {result['resize']}, {result['precision']}, weights {result['weights_sha256'][:16]}",
        )
        for name, result in content["protocols"].items()
    ]
    tables.append(("Networks", networks))
    speed = content["samples"]["images_per_second"]
    told = f"{speed:.1f} images/s through the network" if speed else "from the cache"
    tables.append(("Settings", [("features", told), *_pairs(content["settings"])]))
    tables.append(("Machine", [("created", content["created"]), *_pairs(content["machine"])]))
    return tables


def show_number(value: float | None, error: float | None) -> str:
    """A value with as many digits as its error leaves meaning to; a dash where there is none."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _pairs(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _plain(value)) for key, value in facts.items() if value not in (None, [], "")]


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
