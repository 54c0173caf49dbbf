"""All rows of one table of a board as CSV, numbers as numbers. An estimate takes the columns NAME, NAME_half_width and NAME_n."""

import csv as writing
import io
from collections.abc import Iterator
from typing import Never

from kdbench.board.document import MAIN, Board, Column, Kind, Value
from kdbench.board.formats.plain import Plain, estimate_parts, plain_value
from kdbench.board.intervals import Estimate


def csv(board: Board, name: str = MAIN) -> str:
    """The rows of all tables called `name`; a column that only some of them have is empty in the others."""
    tables = [table for table in board.tables if table.name == name]
    columns = {column.name: column for table in tables for column in table.columns}
    head = [column for column in columns.values()]
    out = io.StringIO()
    writer = writing.writer(out, lineterminator="\n")
    writer.writerow([heading for column in head for heading in _headings(column)])
    for table in tables:
        names = [column.name for column in table.columns]
        for row in table.rows:
            values = dict(zip(names, row, strict=True))
            writer.writerow([part for column in head for part in _cells(column, values.get(column.name))])
    return out.getvalue()


def _headings(column: Column[Never]) -> tuple[str, ...]:
    if column.kind in (Kind.TEXT, Kind.WHOLE):
        return (column.name,)
    return (column.name, f"{column.name}_half_width", f"{column.name}_n")


def _cells(column: Column[Never], value: Value) -> Iterator[Plain]:
    """As many as the column has headings; what was not measured leaves them empty."""
    if isinstance(value, Estimate):
        yield from estimate_parts(value).values()
    else:
        found = plain_value(value)
        assert not isinstance(found, dict)
        yield found
        yield from [None] * (len(_headings(column)) - 1)
