"""A board in JSON.

The schema, version 2: `board`, `schema`, the facts (`suite`, `dataset`, `dataset_digest`, `classes`, `victim`, `students`,
`seeds`, `tolerance`), `notes`, `columns` (by table, a description of each) and `tables` (by name, a list of rows). In a
row, a measured value is {"mean", "half_width", "n"} (half_width: of the 95 % interval, null with one seed), and null where
it was not measured. Accuracies are fractions, rounded to 6 digits.
"""

import json as writing
from dataclasses import asdict

from kdbench.board.document import Board, Table
from kdbench.board.formats.plain import Parts, Plain, plain_value

SCHEMA = 2

Row = dict[str, Plain | Parts]


def json(board: Board) -> str:
    """The facts, the notes, and all tables but those that are for people only."""
    tables: dict[str, list[Row]] = {}
    about: dict[str, dict[str, str]] = {}
    for table in board.tables:
        if not table.human_only:
            tables.setdefault(table.name, []).extend(_rows(table))
            about.setdefault(table.name, {}).update((column.name, column.about) for column in table.columns)
    head = {"board": board.name, "schema": SCHEMA, **asdict(board.facts), "notes": list(board.notes)}
    content = {**head, "columns": about, "tables": tables}
    return writing.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _rows(table: Table) -> list[Row]:
    names = [column.name for column in table.columns]
    return [{name: plain_value(value) for name, value in zip(names, row, strict=True)} for row in table.rows]
