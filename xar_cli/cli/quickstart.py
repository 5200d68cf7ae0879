"""`xar quickstart`: see the whole of it work, on handwritten digits, in a few minutes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from xar_cli.cli.options import DeviceOption, JsonOption
from xar_cli.cli.printing import print_rows


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that is written.")] = Path("xar-quickstart"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of training and sampling.")] = 0,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, help="Time it may take; training is shortened to fit.")
    ] = 4.5,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Digits, latents, training, samples, Frechet distance: all four stages on real data, in 5 minutes on 2 cores."""
    from xar_cli.errors import UserError
    from xar_cli.launch import LaunchOptions, find_place
    from xar_cli.logs import setup_logs
    from xar_cli.quickstart import quickstart as run_quickstart

    setup_logs()
    place = find_place(LaunchOptions())
    if place.world_size > 1:
        raise UserError(
            f"A quickstart is one process, and this one is rank {place.rank} of {place.world_size}.",
            "Start it without srun or torchrun; where RANK and WORLD_SIZE are left over, unset them.",
        )
    result = run_quickstart(out, seed, minutes, device)
    if as_json:
        typer.echo(json.dumps(result))
        return
    print_rows(
        [
            (
                "class accuracy",
                f"{result['class_accuracy']:.1%} of the samples are read as the digit they were asked to be",
            ),
            ("Frechet distance", f"{result['frechet_distance']:.2f}"),
            ("  floor", f"{result['frechet_floor']:.2f} (real held-out digits)"),
            ("  ceiling", f"{result['frechet_ceiling']:.2f} (the same network, untrained)"),
            ("time", f"{result['seconds'] / 60:.1f} minutes"),
            *((name.replace("_", " "), path) for name, path in result["paths"].items()),
        ]
    )
    typer.echo(f"\nNext: xar sample --run {shlex.quote(result['paths']['run'])} --class 7 --grid 8x4 --save sevens.png")
