"""All formats. To add one, add it to `FORMATS`."""

from collections.abc import Callable
from dataclasses import dataclass

from kdbench.board.document import Board
from kdbench.board.formats.csv import csv
from kdbench.board.formats.html import html
from kdbench.board.formats.json import json
from kdbench.board.formats.markdown import markdown
from kdbench.board.formats.terminal import terminal
from kdbench.errors import unknown


@dataclass(frozen=True)
class Format:
    """A format by the name that people ask for it, which is also the ending of its files.

    write: the text of a board for a terminal of that many characters (None: as the terminal has); files ignore it.
    in_folder: whether results folders hold such files. all_boards: whether people are shown all boards in it, in a row.
    """

    name: str
    write: Callable[[Board, int | None], str]
    in_folder: bool = False
    all_boards: bool = False


FORMATS = (
    Format("table", terminal, all_boards=True),
    Format("md", lambda board, width: markdown(board), in_folder=True, all_boards=True),
    Format("csv", lambda board, width: csv(board), in_folder=True),
    Format("json", lambda board, width: json(board), in_folder=True),
    Format("html", lambda board, width: html(board)),
)


def format_of(name: str) -> Format:
    """The format of that name. Raises `KdbenchError` for one that does not exist."""
    for found in FORMATS:
        if found.name == name:
            return found
    raise unknown("format", name, [found.name for found in FORMATS])


def render(board: Board, format: str, width: int | None = None) -> str:
    """The board as text in one of `FORMATS`. Raises `KdbenchError` for a format that does not exist."""
    return format_of(format).write(board, width)
