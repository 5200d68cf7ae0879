"""`xar fid`: numbers for a set of images against a reference, with the protocol beside each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from xar_cli.cli.options import JsonOption

app = typer.Typer(help="Judge images against a reference: Frechet distance and more, by named protocols.")


@app.callback(invoke_without_command=True)
def fid(
    context: typer.Context,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Folder of images, or an ADM .npz batch.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Real images to compare with.")
    ] = None,
    protocol: Annotated[str, typer.Option("--protocol", help="How to measure: digits.")] = "digits",
    as_json: JsonOption = False,
) -> None:
    """Measure --samples against --reference and print what comes out."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from xar_cli.errors import UserError
    from xar_cli.evaluate import evaluate

    if samples is None or reference is None:
        raise UserError("Two sets of images are needed.", "Give --samples FOLDER and --reference FOLDER.")
    result = evaluate(samples, reference, protocol)
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    table = Table("metric", "value", "protocol", "images", "reference", box=None)
    where = (result.protocol, str(result.count), f"{result.reference} ({result.reference_count})")
    table.add_row("Frechet distance", f"{result.frechet_distance:.3f}", *where)
    if result.class_accuracy is not None:
        table.add_row("class accuracy", f"{result.class_accuracy:.4f}", *where)
    Console().print(table)
