"""From what a person typed to `SampleSettings`: which recipe, which classes, which folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from xar_cli.config import Config, load_recipe
from xar_cli.config.recipes import override
from xar_cli.data.imagenet import imagenet_names
from xar_cli.errors import UserError, did_you_mean
from xar_cli.run_dir import RunDir, require_writable
from xar_cli.sample.labels import parse_classes
from xar_cli.sample.manifest import count_there
from xar_cli.sample.settings import Pack, SampleSettings
from xar_cli.weights import WeightsFile, open_weights

DEFAULT_COUNT = 64
LONGEST_CLASSES_TEXT = 120  # bytes of --class in the name of a folder; a name has 255
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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
    grid: tuple[int, int] | None = None,
    picture: Path | None = None,
    at_least: bool = False,
) -> SampleSettings:
    """Settings for a source of weights; opens it to learn its recipe and class names, and writes nothing.

    With `at_least`, a folder that was made to hold more images than `count` keeps its own number.

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
            name += f"-class{classes_text(classes)}"
        out = (RunDir(Path(source)).samples if is_run else Path("samples")) / name
    try:
        out.exists()
    except OSError as error:
        raise UserError(f"'{out}' cannot be a folder: {error.strerror}.", "Give another --out.") from None
    if at_least:
        count = max(count, count_there(out))
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
        grid=grid,
        picture=picture,
        device=device,
    )


def class_names(found: WeightsFile, config: Config) -> list[str]:
    """Readable names of the labels: those stored with the weights, ImageNet's for a model of its 1,000 classes."""
    if found.class_names:
        titles = imagenet_names()
        return [titles.get(name, name) for name in found.class_names]
    known = list(imagenet_names().values())
    return known if config.data.num_classes == len(known) else []


def classes_text(classes: str) -> str:
    """The text of --class as a part of a folder's name; a long one is cut, and told apart by its hash."""
    text = classes.replace(",", "+").replace("/", "")
    data = os.fsencode(text)
    if len(data) <= LONGEST_CLASSES_TEXT:
        return text
    return f"{data[:LONGEST_CLASSES_TEXT].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"


def check_picture(option: str, path: Path) -> None:
    """Refuse a picture that could not be written once it is drawn; nothing is created.

    Raises:
        UserError: no image format has such an ending, it is a folder, or its folder cannot be written to.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(
            f"'{option} {path}' does not end as a picture does.", f"Use one of {', '.join(PICTURE_SUFFIXES)}."
        )
    try:
        is_folder = path.is_dir()
        require_writable(path.parent, 0, "a picture")
    except OSError as error:
        raise UserError(f"'{option} {path}' cannot be a file: {error.strerror}.", "Name another file.") from None
    if is_folder:
        raise UserError(f"'{option} {path}' is a folder.", "Name a file in it.")


def check_explain(**unread: object) -> None:
    """Refuse options that --explain does not read, by name; None and [] stand for options not given.

    Raises:
        UserError: some were given.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in unread.items() if value not in (None, [])]
    if given:
        raise UserError(
            f"--explain makes one picture of image 0 and does not read {', '.join(given)}.",
            f"Leave {'it' if len(given) == 1 else 'them'} away, or --explain.",
        )


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
    if not (columns.isdecimal() and rows.isdecimal() and int(columns) and int(rows)):
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

    YAML reads a bare 40:15 and 010 as numbers to other bases: a schedule of steps is quoted, and a number of steps
    loses its zeros. An interval is LOW:HIGH.
    """
    texts = {key: str(value) for key, value in chosen.items() if value is not None}
    if "num_steps" in texts:
        steps = texts["num_steps"]
        texts["num_steps"] = str(int(steps)) if steps.isdecimal() else json.dumps(steps)
    if "guidance_interval" in texts:
        texts["guidance_interval"] = f"[{texts['guidance_interval'].replace(':', ', ')}]"
    return [f"sample.{key}={text}" for key, text in texts.items()]
