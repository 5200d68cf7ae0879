"""How commands print a result for people: one plain table on stdout, never cut to the terminal's width."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from traceback import walk_tb

import typer


def print_rows(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows of text as aligned columns, every character as it is: brackets and colons mean nothing here.

    Into a stdout that is closed (`>&-`) nothing is printed, as with `typer.echo`.
    """
    if sys.stdout is None:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, show_header=bool(header), pad_edge=False)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 10_000  # a file or a pipe has no width: never wrap or cut
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def is_of_printing(error: BaseException) -> bool:
    """Whether an error arose where a result, or help, was printed: the disk behind `>` is full, say."""
    from rich.console import Console

    printing = (typer.echo.__module__, Console.__module__)
    return any(frame.f_globals.get("__name__") in printing for frame, _ in walk_tb(error.__traceback__))


def throw_away_stdout() -> None:
    """Let what is still to be written to a stdout that fails go nowhere, or Python tries again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
