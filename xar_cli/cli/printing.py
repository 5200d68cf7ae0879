"""How commands print a result for people: one plain table on stdout, never cut to the terminal's width."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


def print_rows(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows of text as aligned columns, every character as it is: brackets and colons mean nothing here."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, show_header=bool(header), pad_edge=False)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 10_000  # a file or a pipe has no width: never wrap or cut
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
