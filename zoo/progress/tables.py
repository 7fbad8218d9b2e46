"""How tables look and how wide they are: names are never cut, and what is beside the point is shown with --wide.

Rich shortens what does not fit to `…`, names first. Here columns that matter less are left out in a narrow terminal,
sentences go on in the next line, and a table whose words are wider than the terminal is printed as wide as they are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from klas_zoo.units import printable

UNLIMITED = 10_000
"""Columns of a file or pipe."""
_GAP = 2  # between columns
_SENTENCE = 24  # columns in which a sentence still reads well


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        number: aligned to the right, and never broken.
        name: never broken: whoever reads it may want to copy it.
        wide: shown with --wide only.
        spare: left out where the table would be wider than the terminal.
    """

    heading: str
    number: bool = False
    name: bool = False
    wide: bool = False
    spare: bool = False


Row = tuple[Sequence[str], str]
"""The text of every column, and a style of rich's for the whole row."""


def new_table(
    title: str, columns: Sequence[Column], rows: Iterable[Row], *, wide: bool = False, caption: str = ""
) -> Table:
    """A table of those columns that are shown, for the terminal it is made in. Nothing in it reaches that as a command.

    Args:
        wide: all columns, and as wide as they are.
        caption: below the table; it also says so where columns are left out.
    """
    rows = [([printable(cell) for cell in cells], style) for cells, style in rows]
    texts = [[column.heading, *(cells[place] for cells, _ in rows)] for place, column in enumerate(columns)]
    natural = [_longest(text.split("\n") for text in one) for one in texts]
    limit = UNLIMITED if wide else terminal_width()
    least = [
        whole if column.name or column.number else _longest(text.split() for text in one)
        for column, whole, one in zip(columns, natural, texts, strict=True)
    ]
    shown = [place for place, column in enumerate(columns) if wide or not column.wide]
    for place in reversed(range(len(columns))):
        folded = (min(natural[one], max(least[one], _SENTENCE)) for one in shown)
        if columns[place].spare and _total(folded) > limit:
            shown.remove(place)
    widths = _fitted({place: natural[place] for place in shown}, least, limit)
    if len(shown) < len(columns) and any(column.wide for column in columns):
        caption = "; ".join(filter(None, (caption, "--wide shows more columns")))
    table = Table(
        title=printable(title), title_justify="left", title_style="bold",
        caption=printable(caption) or None, caption_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for place in shown:
        column = columns[place]
        table.add_column(
            column.heading, justify="right" if column.number else "left", overflow="fold", width=widths[place]
        )
    for cells, style in rows:
        table.add_row(*(cells[place] for place in shown), style=style)
    return table


def show(*things: object) -> None:
    """Prints to stdout; names are text, not rich's markup. Tables are as wide as they were made.

    Titles and captions are as wide as the terminal: rich would break them where the table ends.
    """
    for thing in things:
        width = terminal_width()
        if not isinstance(thing, Table):
            Console(width=width, markup=False, highlight=False).print(thing)
            continue
        body = copy(thing)
        body.title = body.caption = None
        total = _total(column.width or 0 for column in thing.columns)
        console = Console(width=max(min(width, 100), total), markup=False, highlight=False)
        if thing.title:
            console.print(thing.title, style="bold")
        console.print(body)
        if thing.caption:
            console.print(thing.caption, style="dim italic")


def terminal_width() -> int:
    """Columns of the terminal; where stdout is none, $COLUMNS or `UNLIMITED`."""
    if sys.stdout.isatty():
        return Console().width
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else UNLIMITED


def _fitted(natural: dict[int, int], least: Sequence[int], limit: int) -> dict[int, int]:
    """Widths that fit into the limit, or the least ones; the column with most to spare gives first."""
    widths = dict(natural)
    while _total(widths.values()) > limit:
        place = max(widths, key=lambda one: widths[one] - least[one])
        if widths[place] == least[place]:
            break
        widths[place] -= 1
    return widths


def _longest(parts: Iterable[Iterable[str]]) -> int:
    return max((cell_len(part) for one in parts for part in one), default=0)


def _total(widths: Iterable[int]) -> int:
    """Of columns and the gaps between them."""
    found = list(widths)
    return sum(found) + _GAP * (len(found) - 1)
