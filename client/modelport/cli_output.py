"""What commands print: JSON documents, and tables of plain texts that fit the terminal, with nothing in them cut."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_GAP = 2
_LEAST_WRAPPED = 24
_NO_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    name: str
    """Its heading."""
    rank: int = 0
    """Where there is no room, those of the highest rank are left out first; those of rank 0 never."""
    wraps: bool = False
    """Whether its texts may take several lines."""


def counted(count: int, what: str) -> str:
    """Returns a number of things for people: ``1 row``, ``2,000 rows``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def print_json(document: Any) -> None:
    """Prints one JSON document.

    Raises:
        ValueError: if there is a NaN or an infinity in it.
    """
    json.dump(document, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def make_console() -> Console:
    """Returns a console on standard output; without a limit where that is neither a terminal nor of a set width."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _NO_LIMIT
    return console


def fits(columns: Sequence[Column], rows: Sequence[Sequence[str]], console: Console) -> bool:
    """Returns whether there is room for all columns with each row in one line."""
    return sum(_widths(columns, rows)) + _GAP * (len(columns) - 1) <= console.width


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Prints a table, without the columns that are empty or for which there is no room.

    Args:
        columns: the columns, in their order.
        rows: a text for each column.
        console: where to; standard output by default.
    """
    from rich.table import Table
    from rich.text import Text

    console = console if console is not None else make_console()
    widths = _widths(columns, rows)
    used = [place for place, column in enumerate(columns) if column.rank == 0 or any(row[place] for row in rows)]
    shown = _with_room(columns, widths, used, console.width)
    tight = _least(columns, widths, shown) > console.width
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for place in shown:
        column = columns[place]
        table.add_column(column.name, overflow="fold", no_wrap=not column.wraps and not tight)
    for row in rows:
        table.add_row(*(Text(row[place]) for place in shown))
    console.print(table)
    if left_out := [columns[place].name for place in used if place not in shown]:
        text = f"no room for {', '.join(left_out)}: --json has them, and a wider terminal"
        console.print(Text(text, "dim"))


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    from rich.cells import cell_len

    return [max(map(cell_len, [column.name, *(row[place] for row in rows)])) for place, column in enumerate(columns)]


def _least(columns: Sequence[Column], widths: Sequence[int], places: Sequence[int]) -> int:
    least = (min(widths[place], _LEAST_WRAPPED) if columns[place].wraps else widths[place] for place in places)
    return sum(least) + _GAP * (len(places) - 1)


def _with_room(columns: Sequence[Column], widths: Sequence[int], places: Sequence[int], width: int) -> list[int]:
    shown = list(places)
    while _least(columns, widths, shown) > width and any(columns[place].rank for place in shown):
        shown.remove(max(shown, key=lambda place: columns[place].rank))
    return shown
