"""The plots of a results folder; the same cells give the same bytes."""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import kdbench
from kdbench import records as results
from kdbench.atomic import write_bytes, write_text
from kdbench.board.plots import curves, figures
from kdbench.board.study import Study, studies
from kdbench.board.sweeps import sweeps
from kdbench.records import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "plots"
DIGEST = ".digest"
FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Plot:
    """A plot: its file name without ending, what it shows, and how it is drawn."""

    name: str
    caption: str
    figure: Callable[[], "Figure"]


def plots(cells: Iterable[Cell]) -> list[Plot]:
    """The plots that these cells have numbers for, the students in order. Raises as `accuracy_board`."""
    found = studies(cells)
    drawn = [plot for student in found for plot in _plots(student, len(found) > 1)]
    if curves.has_sizes(found):
        drawn.append(
            Plot("students", "Students smaller and larger than the victim", partial(curves.student_sizes, found))
        )
    return drawn


def draw(folder: Path, force: bool = False) -> list[Path]:
    """Draw the plots of the cells under `folder` into its `plots`, as PNG and SVG; the files.

    Nothing is drawn again while the cells, this code and the files are as they were, unless `force`.
    """
    wanted = plots(results.read(folder))
    paths = [folder / FOLDER / f"{plot.name}.{format}" for plot in wanted for format in FORMATS]
    digest = _digest(folder)
    if not force and _state(folder)[:1] == [digest] and all(path.is_file() for path in paths):
        return paths
    (folder / FOLDER).mkdir(exist_ok=True)
    for plot in wanted:
        save(plot, folder / FOLDER)
    for name in set(_state(folder)[1:]) - {path.name for path in paths}:
        (folder / FOLDER / name).unlink(missing_ok=True)  # drawn from cells that are no longer there
    write_text(folder / FOLDER / DIGEST, "\n".join([digest, *(path.name for path in paths)]) + "\n")
    return paths


def _plots(found: Study, several: bool) -> list[Plot]:
    suffix = f"-{found.student.replace(':', '-').replace('/', '-')}" if several else ""
    drawn = [
        Plot(f"{name}{suffix}", caption, partial(make, found))
        for name, (caption, has_numbers, make) in _KINDS.items()
        if has_numbers(found)
    ]
    for role, players, panels_of in (
        ("defense", found.defenses, curves.of_defense),
        ("attack", found.attacks, curves.of_attack),
    ):
        for swept in sweeps(role, players):
            if panels := panels_of(found, swept):
                caption = f"{swept.method} along {swept.field}"
                drawn.append(Plot(f"{swept.name}{suffix}", caption, partial(curves.along, found, swept, panels)))
    return drawn


_KINDS: Mapping[str, tuple[str, Callable[[Study], bool], Callable[[Study], "Figure"]]] = {
    "stolen-accuracy": ("Stolen accuracy, defense against attack", figures.has_attack_runs, figures.student_accuracy),
    "protection": ("Protection by each defense", figures.has_protections, figures.protection),
    "trade-off": ("What protection costs", figures.has_protections, figures.trade_off),
    "queries": ("Stolen accuracy against queries", curves.has_query_counts, curves.query_efficiency),
    "adversarial-accuracy": ("Adversarial accuracy", figures.has_robustness, figures.adversarial_accuracy),
    "transfer": ("Transfer from student to victim", figures.has_transfers, figures.transfer),
}


def save(plot: Plot, folder: Path) -> None:
    from matplotlib import style

    with style.context(["default", figures.STYLE]):  # whatever the user's own matplotlibrc says
        figure = plot.figure()
        for format in FORMATS:
            content = io.BytesIO()
            figure.savefig(content, format=format, metadata=_TIMELESS[format])
            write_bytes(folder / f"{plot.name}.{format}", content.getvalue())


# By default an SVG says when it was made, and both say by which version of matplotlib.
_TIMELESS: Mapping[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def _digest(folder: Path) -> str:
    """Of all that the plots depend on: the cells, and the code."""
    content = hashlib.sha256(kdbench.__version__.encode())
    sources = sorted(Path(__file__).parent.glob("*.py"))
    for path in [*sources, *sorted((folder / results.FOLDER).glob("*.json"))]:
        content.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return content.hexdigest()


def _state(folder: Path) -> Sequence[str]:
    """What the last drawing wrote down: the digest, and the files that it drew."""
    path = folder / FOLDER / DIGEST
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
