"""How commands print a result for people: one plain table on stdout, never cut to the terminal's width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def print_rows(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows of text as aligned columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, show_header=bool(header), pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width: never wrap or cut
        console = Console(width=10_000)
    console.print(table)
