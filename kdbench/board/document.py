"""A board as tables, and its formats: terminal, Markdown, CSV, JSON, HTML.

The JSON schema, version 1: `board`, `schema`, the facts (`suite`, `dataset`, `dataset_digest`, `classes`, `victim`,
`students`, `seeds`, `tolerance`), `notes`, `columns` (by table, a description of each) and `tables` (by name, a list of
rows). In a row, a measured value is {"mean", "half", "n"} (half: half-width of the 95 % interval, null with one seed),
and null where it was not measured. Accuracies are fractions, rounded to 6 digits. A CSV has the rows of one table; a
measured value takes the three columns NAME, NAME_half and NAME_n.
"""

import io
import json
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from kdbench.board.intervals import Estimate
from kdbench.errors import unknown

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console
    from rich.table import Table as RichTable

SCHEMA = 1
DIGITS = 6
MAIN = "ranking"
NARROWEST, WIDEST = 14, 22  # characters of a terminal for a column of words

Value = Estimate | str | int | float | bool | None
Row = Mapping[str, Value]


class Kind(Enum):
    """What a column holds, and so how a person reads it."""

    TEXT = "text"
    WHOLE = "whole"
    SHARE = "share"
    """A fraction, read in percent."""
    DIFFERENCE = "difference"
    """A difference of fractions, read in signed percentage points."""
    COUNT = "count"
    NORM = "norm"


@dataclass(frozen=True)
class Column:
    """A column: its name in files, its heading for people, what it says.

    spare: how readily a narrow terminal leaves it out (0: never). shown: whether people see it at all.
    """

    name: str
    heading: str
    kind: Kind
    about: str
    drop_order: int = 0
    shown: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of one student (empty: of all). breaks: texts that stand before the row of that index.

    people_only: it repeats another table's numbers in a shape for reading, and stays out of files. folded: too long to
    be read at once.
    """

    name: str
    title: str
    student: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    breaks: Mapping[int, str]
    human_only: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Board:
    """A leaderboard: what it is about, its tables, and what must be known to read them."""

    name: str
    title: str
    facts: Mapping[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str]


def render(board: Board, format: str, width: int | None = None) -> str:
    """The board as text in one of `FORMATS`; `width`: characters of a terminal line.

    Raises `KdbenchError` for a format that does not exist.
    """
    if format == "table":
        return terminal(board, width or shutil.get_terminal_size((120, 40)).columns)
    if format not in _FILES:
        raise unknown("format", format, FORMATS)
    return _FILES[format](board)


def markdown(board: Board, level: int = 1) -> str:
    """The board as Markdown; `level`: of its first heading."""
    parts = [f"{'#' * level} {board.title}", facts_line(board)]
    for table in board.tables:
        title, body = _full_title(board, table), _markdown_table(table)
        folded = f"<details><summary>{escape(title)}</summary>\n\n{body}\n\n</details>"
        parts += [folded] if table.folded else [f"{'#' * (level + 1)} {title}", body]
    parts.append("\n".join(f"- {note}" for note in board.notes))
    return "\n\n".join(parts) + "\n"


def csv(board: Board, name: str = MAIN) -> str:
    """All rows of the tables called `name` as CSV, numbers as numbers."""
    return str(frame(board, name).to_csv(index=False, lineterminator="\n"))


def frame(board: Board, name: str = MAIN) -> "DataFrame":
    """All rows of the tables called `name`; a measured value takes three columns (mean, half, n)."""
    from pandas import DataFrame

    tables = [table for table in board.tables if table.name == name]
    columns = list({column.name: column for table in tables for column in table.columns}.values())
    rows = [_flat(row, columns) for table in tables for row in table.rows]
    return DataFrame(rows, columns=[name for column in columns for name in _flat_names(column)], dtype=object)


def terminal(board: Board, width: int) -> str:
    """The board for a terminal: what does not fit into `width` goes by columns, tables for people as a whole."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, emoji=False, markup=False, color_system=None)
    for table in board.tables:
        torn = table.human_only and width < NARROWEST * len(table.columns)
        if table.rows and not table.folded and not torn:
            console.print(_fitting(console, board, table))
    for note in board.notes:
        console.print(f"- {note}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int] = ()) -> str:
    """A table in Markdown; `right`: the columns that are aligned on the right."""
    rule = ["--:" if index in right else ":--" for index in range(len(head))]
    return "\n".join(_markdown_row(row) for row in [head, rule, *rows])


def facts_line(board: Board) -> str:
    """What was played, in a line."""
    facts = board.facts
    seeds = ", ".join(str(seed) for seed in facts["seeds"])
    return (
        f"Suite {facts['suite']}, data set {facts['dataset']} ({facts['classes']} classes), victim {facts['victim']}, "
        f"student {', '.join(facts['students'])}, n = {len(facts['seeds'])} (seed {seeds})."
    )


def interval_note(n: int) -> str:
    """How numbers over `n` seeds are to be read."""
    if n == 1:
        return "One seed: no intervals, so nobody can be told apart and all share rank 1; at least 3 seeds are needed."
    few = "" if n > 2 else " Two seeds give very wide intervals; at least 3 are needed."
    return f"Means over n seeds ± half of the 95 % t interval; differences are paired by seed.{few}"


def text(value: Value, kind: Kind) -> str:
    """A value as people read it: percent with one decimal and the half-width of its interval."""
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        return _measured(value, kind)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def _measured(value: Estimate, kind: Kind) -> str:
    mean = _number(value.mean, kind)
    if value.half_width is None or (kind is Kind.COUNT and value.half_width == 0):
        return mean
    if kind is Kind.NORM:
        return f"{mean} ± {value.half_width:.1g}"
    return f"{mean} ± {_number(value.half_width, Kind.SHARE if kind is Kind.DIFFERENCE else kind)}"


def _number(value: float, kind: Kind) -> str:
    if kind is Kind.DIFFERENCE:
        return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: no negative zero
    if kind is Kind.SHARE:
        return f"{round(100 * value, 1) + 0.0:.1f}"
    return f"{value:,.0f}" if kind is Kind.COUNT else f"{value:.3g}"


def _json(board: Board) -> str:
    tables: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, dict[str, str]] = {}
    for table in board.tables:
        if not table.human_only:
            tables.setdefault(table.name, []).extend(_plain_row(row, table.columns) for row in table.rows)
            about.setdefault(table.name, {}).update((column.name, column.about) for column in table.columns)
    content = {"board": board.name, "schema": SCHEMA, **board.facts, "notes": board.notes, "columns": about}
    return json.dumps({**content, "tables": tables}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _html(board: Board) -> str:
    parts = [f"<h1>{escape(board.title)}</h1>", f"<p>{escape(facts_line(board))}</p>"]
    for table in board.tables:
        title, body = escape(_full_title(board, table)), _html_table(table)
        folded = f"<details><summary>{title}</summary>\n{body}\n</details>"
        parts.append(folded if table.folded else f"<h2>{title}</h2>\n{body}")
    parts.append("<ul>\n" + "\n".join(f"<li>{escape(note)}</li>" for note in board.notes) + "\n</ul>")
    head = f"<meta charset='utf-8'><title>{escape(board.title)}</title>\n{_STYLE}"
    page = "\n".join(parts)
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{page}\n</body></html>\n"


_STYLE = """<style>
body { font-family: sans-serif; margin: 2em; }
table { border-collapse: collapse; }
th, td { padding: 0.3em 0.8em; border-bottom: 1px solid #ccc; text-align: left; }
</style>
"""


def _html_table(table: Table) -> str:
    from pandas import DataFrame

    columns = [column for column in table.columns if column.shown]
    data = DataFrame(_lines(table, columns), columns=[column.heading for column in columns], dtype=object)
    return str(data.to_html(index=False, border=0))


def _markdown_table(table: Table) -> str:
    columns = [column for column in table.columns if column.shown]
    head = [column.heading for column in columns]
    numbers = [index for index, column in enumerate(columns) if column.kind is not Kind.TEXT]
    return grid(head, _lines(table, columns, emphasis="*"), numbers)


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _fitting(console: "Console", board: Board, table: Table) -> "RichTable":
    """The table with as many columns as fit."""
    columns = [column for column in table.columns if column.shown]
    drawn = _rich_table(board, table, columns)
    for drop_order in sorted({column.drop_order for column in columns} - {0}, reverse=True):
        if console.measure(drawn, options=console.options.update(width=10_000)).maximum <= console.width:
            break
        columns = [column for column in columns if column.drop_order < drop_order]
        drawn = _rich_table(board, table, columns)
    return drawn


def _rich_table(board: Board, table: Table, columns: Sequence[Column]) -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(title=_full_title(board, table), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        words = column.kind is Kind.TEXT
        heading = column.heading if words else column.heading.replace(" ", "\n")
        widest = WIDEST if words else None
        justify: Literal["left", "right"] = "left" if words else "right"
        drawn.add_column(heading, justify=justify, no_wrap=not words, overflow="fold", max_width=widest)
    for row in _lines(table, columns):
        drawn.add_row(*row)
    return drawn


def _lines(table: Table, columns: Sequence[Column], emphasis: str = "") -> list[list[str]]:
    """The rows as people read them, with the breaks between them."""
    lines = []
    name = next(index for index, column in enumerate(columns) if column.kind is Kind.TEXT)
    for index, row in enumerate(table.rows):
        if index in table.breaks:
            words = f"{emphasis}{table.breaks[index]}{emphasis}"
            lines.append([words if place == name else "" for place in range(len(columns))])
        lines.append([text(row.get(column.name), column.kind) for column in columns])
    return lines


def _full_title(board: Board, table: Table) -> str:
    several = table.student and len(board.facts["students"]) > 1
    return f"{table.title}: student {table.student}" if several else table.title


def _flat_names(column: Column) -> tuple[str, ...]:
    if column.kind in (Kind.TEXT, Kind.WHOLE):
        return (column.name,)
    return (column.name, f"{column.name}_half", f"{column.name}_n")


def _flat(row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for column in columns:
        value = _plain(row.get(column.name))
        values = (value["mean"], value["half"], value["n"]) if isinstance(value, dict) else (value,)
        flat |= dict(zip(_flat_names(column), values, strict=False))  # what was not measured leaves three empty places
    return flat


def _plain_row(row: Row, columns: Iterable[Column]) -> dict[str, Any]:
    return {column.name: _plain(row.get(column.name)) for column in columns}


def _plain(value: Value) -> Any:
    if isinstance(value, Estimate):
        return {"mean": _plain(value.mean), "half": _plain(value.half_width), "n": value.n}
    return round(value, DIGITS) + 0.0 if isinstance(value, float) else value


_FILES: Mapping[str, Callable[[Board], str]] = {"md": markdown, "csv": csv, "json": _json, "html": _html}
FORMATS = ("table", *_FILES)
