"""A board in Markdown."""

from collections.abc import Container, Iterable, Sequence
from html import escape

from kdbench.board.document import Board, Kind, Table, facts_line
from kdbench.board.formats.lines import lines, visible


def markdown(board: Board, level: int = 1) -> str:
    """The board as Markdown; `level`: of its first heading."""
    parts = [f"{'#' * level} {board.title}", facts_line(board)]
    for table in board.tables:
        body = _table(table)
        folded = folding(escape(table.full_title), body)
        parts += [folded] if table.folded else [f"{'#' * (level + 1)} {table.full_title}", body]
    parts.append("\n".join(f"- {note}" for note in board.notes))
    return "\n\n".join(parts) + "\n"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int] = ()) -> str:
    """A table in Markdown; `right`: the columns that are aligned on the right."""
    rule = ["--:" if index in right else ":--" for index in range(len(head))]
    return "\n".join(_row(row) for row in [head, rule, *rows])


def folding(summary: str, body: str) -> str:
    """Text that is shown when its summary is clicked."""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _table(table: Table) -> str:
    columns = visible(table)
    numbers = [index for index, column in enumerate(columns) if column.kind is not Kind.TEXT]
    return grid([column.heading for column in columns], lines(table, columns, emphasis="*"), numbers)


def _row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
