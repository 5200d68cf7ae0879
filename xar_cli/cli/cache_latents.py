"""`xar cache-latents`: make a latent cache; `verify` and `info` look at one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from xar_cli.cli.options import (
    DeviceOption,
    DryRunOption,
    JsonOption,
    RecipeOption,
    SetOption,
    TokenizerWeightsOption,
)

app = typer.Typer(help="Encode an image folder into a latent cache; `verify` and `info` look at one.")


@app.callback(invoke_without_command=True)
def cache_latents(
    context: typer.Context,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder with one subfolder per class.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Cache file to make or to continue.")] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    flip: Annotated[str, typer.Option(help="encode: store the mirror image too; none: do not.")] = "encode",
    dtype: Annotated[str, typer.Option(help="float16 or float32, as stored.")] = "float16",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out any number of unusable images.")
    ] = False,
    max_bad: Annotated[
        int, typer.Option(help="How many unusable images to leave out before the work ends.")
    ] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Images encoded together; default by image size.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode; default one per core.")] = None,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode an image folder into a latent cache. Interrupted at any point, the same command goes on from
    there.
    """
    if context.invoked_subcommand:
        return
    from xar_cli.cache.stage import CacheSettings, plan_cache, run_cache
    from xar_cli.config import load_recipe
    from xar_cli.distributed import process_group
    from xar_cli.errors import UserError
    from xar_cli.logs import setup_logs

    for option, value in (("--images", images), ("--out", out), ("--recipe", recipe)):
        if value is None:
            raise UserError(f"{option} is missing.", "See `xar cache-latents --help`.")
    setup_logs()
    config = load_recipe(str(recipe), overrides or ())
    settings = CacheSettings(
        images=Path(str(images)),
        out=Path(str(out)),
        tokenizer_weights=tokenizer_weights,
        flip=flip,
        dtype=dtype,
        max_bad=None if skip_bad else max_bad,
        batch_size=batch_size,
        workers=workers,
    )
    if dry_run:
        result = plan_cache(settings, config, device).as_dict()
    else:
        with process_group(device) as ranks:
            result = run_cache(settings, config, ranks).as_dict()
    _print(result, as_json)


def _print(values: dict[str, object], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
