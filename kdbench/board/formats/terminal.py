"""A board for a terminal: what does not fit into its width goes by columns, tables for people as a whole."""

import io
import shutil
from typing import TYPE_CHECKING, Literal

from kdbench.board.document import Board, Kind, Table
from kdbench.board.formats.lines import Columns, lines, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

NARROWEST, WIDEST = 14, 22  # characters of a terminal for a column of words


def terminal(board: Board, width: int | None = None) -> str:
    """The board in lines of at most `width` characters; None: as many as the terminal has."""
    from rich.console import Console

    out = io.StringIO()
    width = width or shutil.get_terminal_size((120, 40)).columns
    console = Console(file=out, width=width, highlight=False, emoji=False, markup=False, color_system=None)
    for table in board.tables:
        torn = table.human_only and width < NARROWEST * len(table.columns)
        if table.rows and not table.folded and not torn:
            console.print(_fitting(console, table))
    for note in board.notes:
        console.print(f"- {note}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _fitting(console: "Console", table: Table) -> "RichTable":
    """The table with as many columns as fit."""
    columns = visible(table)
    drawn = _rich_table(table, columns)
    for drop_order in sorted({column.drop_order for column in columns} - {0}, reverse=True):
        if console.measure(drawn, options=console.options.update(width=10_000)).maximum <= console.width:
            break
        columns = [column for column in columns if column.drop_order < drop_order]
        drawn = _rich_table(table, columns)
    return drawn


def _rich_table(table: Table, columns: Columns) -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.full_title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        words = column.kind is Kind.TEXT
        heading = column.heading if words else column.heading.replace(" ", "\n")
        justify: Literal["left", "right"] = "left" if words else "right"
        widest = WIDEST if words else None
        drawn.add_column(heading, justify=justify, no_wrap=not words, overflow="fold", max_width=widest)
    for line in lines(table, columns):
        drawn.add_row(*line)
    return drawn
