"""From what a person typed to `SampleSettings`: which recipe, which classes, which folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xar_cli.config import Config, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.imagenet import imagenet_names
from xar_cli.errors import UserError
from xar_cli.run_dir import RunDir
from xar_cli.sample.labels import parse_classes
from xar_cli.sample.stage import SampleSettings
from xar_cli.weights import WeightsFile, open_weights


def build_settings(
    source: str | Path,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    ema: bool,
    classes: str | None,
    count: int,
    seed: int,
    out: Path | None,
    tokenizer_weights: Path | None,
    device: str,
) -> SampleSettings:
    """Settings for a source of weights; opens it to learn its recipe and class names, and writes nothing.

    Raises:
        UserError: the source or recipe does not exist or they do not fit, a class is unknown, a value is out of range.
    """
    found = open_weights(source, load_recipe(recipe) if recipe else None, ema=ema)
    config = override(found.config, overrides)
    names = class_names(found, config)
    is_run = RunDir(Path(source)).exists()
    if out is None:
        name = f"seed{seed}-{config.sample.solver}{config.sample.num_steps}-cfg{config.sample.guidance_scale:g}"
        if classes is not None:
            name += f"-class{classes.replace(',', '+').replace('/', '')}"
        out = (RunDir(Path(source)).samples if is_run else Path("samples")) / name
    weights = source if str(source).startswith("hf://") else Path(source).absolute()
    return SampleSettings(
        config=config,
        weights=str(weights),
        ema=ema,
        out=out.absolute(),
        count=count,
        seed=seed,
        classes=tuple(parse_classes(classes, config.data.num_classes, names)),
        class_names=tuple(names),
        tokenizer_weights=tokenizer_weights,
        device=device,
    )


def class_names(found: WeightsFile, config: Config) -> list[str]:
    """Readable names of the labels: those stored with the weights, ImageNet's for a model of its 1,000 classes."""
    if found.class_names:
        titles = imagenet_names()
        return [titles.get(name, name) for name in found.class_names]
    known = list(imagenet_names().values())
    return known if config.data.num_classes == len(known) else []


def parse_grid(text: str) -> tuple[int, int]:
    """'8x4' -> 8 columns, 4 rows."""
    columns, _, rows = text.lower().partition("x")
    if not (columns.isdigit() and rows.isdigit() and int(columns) and int(rows)):
        raise UserError(f"'--grid {text}' is not of the form COLUMNSxROWS.", "For example: --grid 8x4.")
    return int(columns), int(rows)
