"""The table writer of all commands, for a terminal and for Markdown."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.segment import Segments
from rich.table import Table as RichTable

_GAP = 2  # characters between two columns


@dataclass(frozen=True)
class Table:
    """Cells of text under a header.

    Attributes:
      header: the column names.
      rows: the cells, as many in each row as in the header.
      text_columns: the number of columns, from the left, that hold text. They are aligned left, the others right.
      title: a heading, or "".
      notes: sentences to print below the table.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    title: str = ""
    notes: tuple[str, ...] = ()


def markdown(table: Table) -> list[str]:
    """Return the lines of the table's grid in Markdown, without title and notes."""
    rule = ["---" if column < table.text_columns else "---:" for column in range(len(table.header))]
    return [_markdown_row(row) for row in (table.header, rule, *table.rows)]


def section(table: Table, heading: str) -> list[str]:
    """Return the lines of a Markdown section, each part followed by a blank line: title, grid, and notes.

    Args:
      table: what to write.
      heading: the number signs before the title, such as "##".
    """
    lines = [f"{heading} {table.title}", "", *markdown(table), ""]
    if table.notes:
        lines += [*(f"- {note}" for note in table.notes), ""]
    return lines


def show(table: Table, console: Console, *, wrap: bool = True, highlight: Collection[int] = ()) -> None:
    """Print the title and the grid, without the notes.

    Args:
      table: the table.
      console: the console to print to.
      wrap: break cells in a narrow terminal. Otherwise rows run past its edge, which keeps every number on one line.
      highlight: indices of the rows to print in bold red.
    """
    if table.title:
        console.print(table.title, style="italic", markup=False)
    rich = _grid(table, wrap)
    for index, row in enumerate(table.rows):
        rich.add_row(*map(escape, row), style="bold red" if index in highlight else None)
    if wrap:
        console.print(rich, soft_wrap=False)
    else:
        options = console.options.update(width=width(table), max_width=width(table))
        console.print(Segments(console.render(rich, options)), crop=False, no_wrap=True, overflow="ignore", end="")
    console.print()


def width(table: Table) -> int:
    """Return the characters of the widest line that `show` prints without wrapping, the title aside."""
    columns = zip(table.header, *table.rows, strict=True)
    return sum(max(map(cell_len, column)) for column in columns) + _GAP * (len(table.header) - 1)


def _grid(table: Table, wrap: bool) -> RichTable:
    """Return an empty rich table with the header."""
    rich = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column, name in enumerate(table.header):
        justify = "left" if column < table.text_columns else "right"
        rich.add_column(escape(name), justify=justify, overflow="fold", no_wrap=not wrap)  # type: ignore[arg-type]
    return rich


def show_fields(fields: Sequence[tuple[str, str]], console: Console) -> None:
    """Print names and values in two columns, the values folded at the terminal's edge."""
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields:
        grid.add_row(escape(name), escape(value))
    console.print(grid, soft_wrap=False)


def _markdown_row(cells: Sequence[str]) -> str:
    # A cell may hold Markdown whose bars are escaped already.
    escaped = (re.sub(r"(?<!\\)\|", r"\|", cell) for cell in cells)
    return "| " + " | ".join(escaped) + " |"
