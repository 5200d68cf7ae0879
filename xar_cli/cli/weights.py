"""`xar weights`: see what a file of weights is, convert it, download published ones, push one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from xar_cli.cli.options import JsonOption, RecipeOption, SetOption

app = typer.Typer(help="Inspect, convert, download and push weights.", no_args_is_help=True)

EmaOption = Annotated[bool, typer.Option("--ema/--raw", help="Averaged or raw weights, where a source holds both.")]
SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A file, a run folder, or hf://owner/repo/file@revision.")
]


@app.command()
def info(
    source: SourceArgument, recipe: RecipeOption = None, ema: EmaOption = True, as_json: JsonOption = False
) -> None:
    """Say what weights are: architecture, parameters, averaged or raw, sha256, the recipe they fit."""
    from xar_cli.config import load_recipe
    from xar_cli.run_dir import format_bytes
    from xar_cli.weights.info import describe_source

    facts = describe_source(source, load_recipe(recipe) if recipe else None, ema=ema)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    facts["parameters"] = f"{facts['parameters'] / 1e6:.2f} M"
    facts["bytes"] = format_bytes(facts["bytes"])
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{key:14}{'-' if text in (None, '') else text}")


@app.command()
def convert(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: *.safetensors or *.pth.")],
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    ema: EmaOption = True,
    layout: Annotated[
        Literal["published", "xar"] | None,
        typer.Option("--layout", help="Names inside; default: published for .pth, ours for .safetensors."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert weights between the published layout and ours, bit for bit."""
    from xar_cli.config import load_recipe
    from xar_cli.weights import export_weights, open_weights

    weights = open_weights(source, load_recipe(recipe, overrides or ()) if recipe else None, ema=ema)
    written = export_weights(weights, out, layout)
    result = {"out": str(out), "layout": written, "kind": weights.kind, "recipe": weights.config.name}
    typer.echo(json.dumps(result) if as_json else f"{out}: {written} layout, recipe {weights.config.name}")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="base, large, huge (xAR as published) or kl16.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Download published weights into the hub's cache: says what they are, asks, prints where they lie."""
    from xar_cli.errors import UserError, did_you_mean
    from xar_cli.hub import PUBLISHED, cached, fetch, keep_if_sound, recorded_sha256, remote_facts, require_room
    from xar_cli.run_dir import format_bytes

    if name not in PUBLISHED:
        raise UserError(f"There are no published weights '{name}'.", did_you_mean(name, PUBLISHED))
    published = PUBLISHED[name]
    try:
        size, recorded = remote_facts(published.file)
    except UserError:
        if cached(published.file) is None:
            raise
        size, recorded = None, None  # the hub is out of reach, and not needed
    typer.echo(f"source   {published.file}", err=True)
    typer.echo(f"size     {format_bytes(size or published.megabytes * 1e6)}", err=True)
    typer.echo(f"licence  {published.licence}", err=True)
    if size is not None and cached(published.file) is None:
        require_room(size)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("Nobody is here to agree to the download.", "Add --yes.")
        if not typer.confirm("Download it?", err=True):
            typer.echo("Not downloaded.", err=True)
            raise typer.Exit(1)
    path = fetch(published.file)
    expected = recorded or recorded_sha256(path)
    checked = expected is not None
    if expected is not None:
        keep_if_sound(path, expected)
    else:
        typer.echo("checked  no: the hub cannot be asked for its sha256", err=True)
    typer.echo(json.dumps({"file": str(path), "sha256_checked": checked}) if as_json else str(path))


@app.command()
def push(
    source: SourceArgument,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the hub.")],
    results: Annotated[
        list[Path] | None, typer.Option("--results", help="Output of `xar fid --json`; may be repeated.")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Licence of the weights, as the hub names it (mit, ...)."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    ema: EmaOption = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the model card; upload nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a run's weights with a model card: recipe, results with their protocol, usage."""
    import tempfile

    from xar_cli.hub import open_repo, require_repo_name, upload
    from xar_cli.weights import open_weights
    from xar_cli.weights.card import model_card, read_results, write_model_folder

    require_repo_name(repo)
    measured = [read_results(path) for path in results or ()]
    weights = open_weights(source, ema=ema)
    if dry_run:
        card = model_card(weights, repo, measured, licence)
        typer.echo(json.dumps({"card": card}) if as_json else card, nl=as_json)
        return
    address = open_repo(repo, private)  # before anything is written: one may not be logged in
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(weights, repo, measured, licence, Path(folder))
        upload(Path(folder), repo, f"Weights of recipe {weights.config.name}")
    typer.echo(json.dumps({"address": address}) if as_json else address)
