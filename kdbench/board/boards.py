"""The leaderboards of a folder of results: made, shown and written. Pure functions of the cells."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kdbench.board.document import FORMATS, Board, csv, render
from kdbench.board.tables.accuracy import accuracy_board
from kdbench.board.tables.robustness import robustness_board
from kdbench.errors import unknown
from kdbench.records import Cell, read, write_text

__all__ = [
    "BOARDS", "FORMATS", "accuracy_board", "boards", "leaderboards", "render", "robustness_board", "write_boards",
]  # fmt: skip

BOARDS: Mapping[str, Callable[[Iterable[Cell]], Board]] = {
    "leaderboard": accuracy_board,
    "robustness": robustness_board,
}
ENDINGS = (".md", ".csv", ".json", "-attacks.csv")


def boards(cells: Sequence[Cell]) -> list[Board]:
    """The boards that these cells have something to say on."""
    made = [make(cells) for make in BOARDS.values()]
    return [board for board in made if any(table.rows for table in board.tables)]


def leaderboards(folder: Path, format: str = "table", width: int | None = None) -> str:
    """The leaderboard of the cells under `folder` as text; on a terminal and in Markdown the robustness board follows.

    Raises `KdbenchError` for a format that does not exist, and for a folder without results.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    cells = read(folder)
    chosen = boards(cells) if format in ("table", "md") else [accuracy_board(cells)]
    return "\n".join(render(board, format, width) for board in chosen)


def write_boards(folder: Path) -> list[Path]:
    """Write each board into `folder` as Markdown, CSV (the ranking, and all attacks) and JSON; what was written.

    The files are a function of the cells alone: same cells, same bytes.
    """
    texts: dict[str, str] = {}
    for board in boards(read(folder)):
        texts |= {f"{board.name}.{format}": render(board, format) for format in ("md", "csv", "json")}
        texts[f"{board.name}-attacks.csv"] = csv(board, "attacks")
    for name in {f"{board}{ending}" for board in BOARDS for ending in ENDINGS} - texts.keys():
        (folder / name).unlink(missing_ok=True)  # a board of cells that are no longer there
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]
