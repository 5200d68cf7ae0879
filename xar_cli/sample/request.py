"""From what a person typed to `SampleSettings`: which recipe, which classes, which folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from xar_cli.config import Config, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.imagenet import imagenet_names
from xar_cli.errors import UserError, did_you_mean
from xar_cli.run_dir import RunDir
from xar_cli.sample.labels import parse_classes
from xar_cli.sample.settings import Pack, SampleSettings
from xar_cli.weights import WeightsFile, open_weights

DEFAULT_COUNT = 64


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
    packs: Sequence[Pack] = (),
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
        steps = str(config.sample.num_steps).replace(":", "to")
        name = f"seed{seed}-{config.sample.solver}{steps}-cfg{config.sample.guidance_scale:g}"
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
        packs=tuple(packs),
        device=device,
    )


def class_names(found: WeightsFile, config: Config) -> list[str]:
    """Readable names of the labels: those stored with the weights, ImageNet's for a model of its 1,000 classes."""
    if found.class_names:
        titles = imagenet_names()
        return [titles.get(name, name) for name in found.class_names]
    known = list(imagenet_names().values())
    return known if config.data.num_classes == len(known) else []


def choose_count(count: int | None, grid: tuple[int, int] | None) -> int:
    """How many images: as asked for, as many as the grid has places, or 64.

    Raises:
        UserError: the count does not fill the grid.
    """
    cells = grid[0] * grid[1] if grid else DEFAULT_COUNT
    if count is None:
        return cells
    if grid and (count < cells or count % cells):
        raise UserError(
            f"{count} images do not fill a grid of {grid[0]} x {grid[1]} = {cells}.",
            "Leave --count away, or give a multiple of the grid.",
        )
    return count


def check_balance(count: int, num_classes: int) -> None:
    """Refuse a set of images in which some class of those asked for would have none.

    Raises:
        UserError: fewer images than classes.
    """
    if count < num_classes:
        raise UserError(
            f"{count} images cannot be balanced over {num_classes} classes: {num_classes - count} would have none.",
            f"Give --count {num_classes} or a multiple of it, choose classes with --class, or say --unbalanced.",
        )


def parse_grid(text: str) -> tuple[int, int]:
    """'8x4' -> 8 columns, 4 rows."""
    columns, _, rows = text.lower().partition("x")
    if not (columns.isdigit() and rows.isdigit() and int(columns) and int(rows)):
        raise UserError(f"'--grid {text}' is not of the form COLUMNSxROWS.", "For example: --grid 8x4.")
    return int(columns), int(rows)


def parse_packs(names: Sequence[str]) -> tuple[Pack, ...]:
    """The packed files asked for; raises UserError for another kind than npz or hdf5."""
    found: list[Pack] = []
    for name in names:
        if name not in get_args(Pack):
            raise UserError(f"There is no pack called '{name}'.", did_you_mean(name, get_args(Pack)))
        found.append(cast(Pack, name))
    return tuple(found)


def sampling_overrides(**chosen: object) -> list[str]:
    """What options of the command change of the recipe's section `sample`, as overrides; None changes nothing.

    A schedule of steps is quoted, since YAML reads a bare 40:15 as a number; an interval is LOW:HIGH.
    """
    texts = {key: str(value) for key, value in chosen.items() if value is not None}
    if "num_steps" in texts and not texts["num_steps"].isdigit():
        texts["num_steps"] = json.dumps(texts["num_steps"])
    if "guidance_interval" in texts:
        texts["guidance_interval"] = f"[{texts['guidance_interval'].replace(':', ', ')}]"
    return [f"sample.{key}={text}" for key, text in texts.items()]
