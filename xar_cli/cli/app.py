"""The `xar` program: collects the commands and turns a known error into a sentence, a next step and an exit code.

Nothing here or at the top of a command file may import torch: `xar --help` must be instant.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from xar_cli import __version__
from xar_cli.cli import cache_latents, fid, quickstart, recipes, sample, status, train, weights
from xar_cli.cli.printing import is_of_printing, throw_away_stdout
from xar_cli.errors import UserError

app = typer.Typer(
    name="xar",
    help="Train, sample and judge xAR next-X image generators: cache-latents, train, sample, fid.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.quickstart)
app.add_typer(cache_latents.app, name="cache-latents")
app.command("train")(train.train)
app.command("status")(status.status)
app.command("sample")(sample.sample)
app.add_typer(fid.app, name="fid")
app.add_typer(recipes.app, name="recipes")
app.add_typer(weights.app, name="weights")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    """Options of `xar` itself."""


CTRL_C = 130

# Typer carries its own copy of click since 0.2x; these are whichever classes it raises.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> None:
    """Run `xar`; exits with 0 for success, 1 for a failure during the work, 2 for bad input, 130 for Ctrl-C."""
    try:
        code = app(args=arguments, prog_name="xar", standalone_mode=False)
        if code == CTRL_C:  # some versions of Typer return it in place of raising
            raise KeyboardInterrupt
    except UserError as error:
        _fail(error.message, error.next_step)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("Stopped by Ctrl-C.", "The same command goes on from what is on disk.")
        sys.exit(CTRL_C)
    except OSError as error:
        if not is_of_printing(error):
            raise
        throw_away_stdout()
        _fail(f"The result cannot be printed: {error.strerror}.", "Free some space, or send it to another place.")
        sys.exit(1)
    except _ClickException as error:
        error.show()
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, next_step: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    print(f"  next: {next_step}", file=sys.stderr)
