"""The leaderboards of a results folder: made, shown and written. Pure functions of the cells."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdbench.atomic import write_text
from kdbench.board.document import Board
from kdbench.board.formats.csv import csv
from kdbench.board.formats.rendering import FORMATS, format_of
from kdbench.board.studies import Studies
from kdbench.board.tables.accuracy import accuracy_board
from kdbench.board.tables.robustness import robustness_board

BOARDS: Mapping[str, Callable[[Studies], Board]] = {"leaderboard": accuracy_board, "robustness": robustness_board}
ATTACKS = "attacks"  # the table that is written beside the main one


def boards(studies: Studies) -> list[Board]:
    """The boards that these cells have something to say on."""
    made = [make(studies) for make in BOARDS.values()]
    return [board for board in made if any(table.rows for table in board.tables)]


def leaderboards(found: Sequence[Board], format: str = "table", width: int | None = None) -> str:
    """The boards as text; a format for files holds the first of them only, one for people all.

    Raises `KdbenchError` for a format that does not exist.
    """
    chosen = format_of(format)
    return "\n".join(chosen.write(board, width) for board in (found if chosen.all_boards else found[:1]))


def write_boards(found: Sequence[Board], folder: Path) -> list[Path]:
    """Write each board into `folder` in all formats of results folders, and all attacks as CSV; what was written.

    The files are a function of the cells alone: same cells, same bytes.
    """
    kept = [format for format in FORMATS if format.in_folder]
    texts = {f"{board.name}.{format.name}": format.write(board, None) for board in found for format in kept}
    texts |= {f"{board.name}-{ATTACKS}.csv": csv(board, ATTACKS) for board in found}
    endings = [f"-{ATTACKS}.csv", *(f".{format.name}" for format in kept)]
    for name in {f"{board}{ending}" for board in BOARDS for ending in endings} - texts.keys():
        (folder / name).unlink(missing_ok=True)  # a board of cells that are no longer there
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]
