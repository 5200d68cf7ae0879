"""`xar recipes`: see which recipes there are, read one, check one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from xar_cli.cli.options import JsonOption, SetOption
from xar_cli.cli.printing import print_rows

app = typer.Typer(help="List, show and validate recipes.", no_args_is_help=True)


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the shipped recipes, with what each is for."""
    from xar_cli.config import list_recipes, load_recipe

    recipes = {name: load_recipe(name) for name in list_recipes()}
    if as_json:
        typer.echo(json.dumps({name: recipe.description for name, recipe in recipes.items()}))
        return
    print_rows([(name, recipe.description) for name, recipe in recipes.items()], ("recipe", "what it is"))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print one recipe, resolved: every key with its value, defaults included."""
    from xar_cli.config import dump_config, load_recipe

    config = load_recipe(name, overrides or ())
    typer.echo(config.model_dump_json() if as_json else dump_config(config), nl=as_json)


@app.command()
def validate(
    name: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check one recipe; every fault is reported at once, with exit code 2."""
    from xar_cli.config import check_new_run, load_recipe

    config = load_recipe(name, overrides or ())
    check_new_run(config)
    typer.echo(json.dumps({"valid": True, "name": config.name}) if as_json else f"{name} is valid ({config.name})")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A page for people instead: docs/config.md.")] = False,
) -> None:
    """Print the JSON Schema of a recipe, for editors that complete YAML."""
    from xar_cli.config.reference import config_reference, json_schema

    typer.echo(config_reference() if markdown else json_schema(), nl=not markdown)
