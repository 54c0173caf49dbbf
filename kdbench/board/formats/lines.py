"""The rows of a table as lines of text, as formats for people show them."""

from collections.abc import Sequence
from typing import Never

from kdbench.board.document import Column, Kind, Table, text

Columns = Sequence[Column[Never]]


def visible(table: Table) -> Columns:
    """The columns that people see."""
    return [column for column in table.columns if column.visible]


def lines(table: Table, columns: Columns, emphasis: str = "") -> list[list[str]]:
    """The rows in some of the columns, with the breaks between them; emphasis: stands around the text of a break."""
    places = [table.columns.index(column) for column in columns]
    first_words = next(index for index, column in enumerate(columns) if column.kind is Kind.TEXT)
    found = []
    for index, row in enumerate(table.rows):
        if index in table.breaks:
            words = f"{emphasis}{table.breaks[index]}{emphasis}"
            found.append([words if place == first_words else "" for place in range(len(columns))])
        found.append([text(row[place], column.kind) for place, column in zip(places, columns, strict=True)])
    return found
