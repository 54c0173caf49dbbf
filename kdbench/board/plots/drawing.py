"""All plots of a results folder; the same cells give the same bytes. To add a plot, add it to `PLOTS`."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import kdbench
from kdbench.atomic import write_bytes, write_text
from kdbench.board.plots import curves, heatmaps, protection, robustness, sweep_curves, trade_off
from kdbench.board.plots.style import STYLE
from kdbench.board.studies import Studies
from kdbench.board.study import Study
from kdbench.board.sweeps import sweeps

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


Plots = Callable[[Studies], Iterator[Plot]]
"""The plots of one kind that a folder has numbers for."""


def _each(name: str, caption: str, known: Callable[[Study], bool], draw: Callable[[Study], "Figure"]) -> Plots:
    """A plot for each study; known: whether there is anything to draw."""

    def plots_of(studies: Studies) -> Iterator[Plot]:
        for study in studies.all:
            if known(study):
                yield Plot(name + _suffix(studies, study), caption, partial(draw, study))

    return plots_of


def _sweeps(studies: Studies) -> Iterator[Plot]:
    """Curves along the fields that the suite sweeps."""
    for study in studies.all:
        found = [(swept, sweep_curves.of_defense(study, swept)) for swept in sweeps("defense", study.defenses)]
        found += [(swept, sweep_curves.of_attack(study, swept)) for swept in sweeps("attack", study.attacks)]
        for swept, panels in found:
            if panels:
                name, figure = swept.name + _suffix(studies, study), partial(sweep_curves.along, study, swept, panels)
                yield Plot(name, f"{swept.method} along {swept.field}", figure)


def _sizes(studies: Studies) -> Iterator[Plot]:
    """One plot of all students under a scenario."""
    scenarios = sorted({study.scenario for study in studies.all})
    for scenario in scenarios:
        own = [study for study in studies.all if study.scenario == scenario]
        if curves.has_sizes(own):
            name = "students" if len(scenarios) == 1 else f"students-{_plain(scenario)}"
            yield Plot(name, "Students smaller and larger than the victim", partial(curves.student_sizes, own))


PLOTS: Sequence[Plots] = (
    _each(
        "student-accuracy",
        "Student accuracy, defense against attack",
        heatmaps.has_student_accuracy,
        heatmaps.student_accuracy,
    ),
    _each("protection", "Protection by each defense", protection.has_protection, protection.protection),
    _each("trade-off", "What protection costs", protection.has_protection, trade_off.trade_off),
    _each("queries", "Student accuracy against queries", curves.has_query_counts, curves.query_efficiency),
    _each("adversarial-accuracy", "Adversarial accuracy", robustness.has_robustness, robustness.adversarial_accuracy),
    _each("transfer", "Transfer from student to victim", heatmaps.has_transfer, heatmaps.transfer_map),
    _sweeps,
    _sizes,
)


def plots(studies: Studies) -> list[Plot]:
    """The plots that these cells have numbers for."""
    return [plot for of_kind in PLOTS for plot in of_kind(studies)]


def draw(studies: Studies, folder: Path, force: bool = False) -> list[Path]:
    """Draw the plots of the cells into the `plots` of their folder, as PNG and SVG; the files.

    Nothing is drawn again while the cells, this code and the files are as they were, unless `force`.
    """
    wanted = plots(studies)
    paths = [folder / FOLDER / f"{plot.name}.{format}" for plot in wanted for format in FORMATS]
    digest = _digest(studies)
    if not force and _state(folder)[:1] == [digest] and all(path.is_file() for path in paths):
        return paths
    (folder / FOLDER).mkdir(exist_ok=True)
    for plot in wanted:
        save(plot, folder / FOLDER)
    for name in set(_state(folder)[1:]) - {path.name for path in paths}:
        (folder / FOLDER / name).unlink(missing_ok=True)  # drawn from cells that are no longer there
    write_text(folder / FOLDER / DIGEST, "\n".join([digest, *(path.name for path in paths)]) + "\n")
    return paths


def save(plot: Plot, folder: Path) -> None:
    """Draw one plot into a folder, in all `FORMATS`."""
    from matplotlib import style

    with style.context(["default", STYLE]):  # whatever the user's own matplotlibrc says
        figure = plot.figure()
        for format in FORMATS:
            content = io.BytesIO()
            figure.savefig(content, format=format, metadata=_TIMELESS[format])
            write_bytes(folder / f"{plot.name}.{format}", content.getvalue())


# By default an SVG says when it was made, and both say by which version of matplotlib.
_TIMELESS: Mapping[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def _suffix(studies: Studies, study: Study) -> str:
    """What tells the plots of a study from those of the others."""
    several_students = len(studies.facts.students) > 1
    several_scenarios = len({other.scenario for other in studies.all}) > 1
    names = [study.student] * several_students + [study.scenario] * several_scenarios
    return "".join(f"-{_plain(name)}" for name in names)


def _plain(name: str) -> str:
    """A name as a part of a file's name."""
    return name.replace(":", "-").replace("/", "-")


def _digest(studies: Studies) -> str:
    """Of all that the plots depend on: the cells, and the code of the board."""
    content = hashlib.sha256(kdbench.__version__.encode())
    board = Path(__file__).parent.parent
    for path in sorted(board.rglob("*.py")):
        content.update(f"{path.relative_to(board)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for cell in studies.cells:
        content.update(repr(cell).encode())
    return content.hexdigest()


def _state(folder: Path) -> Sequence[str]:
    """What the last drawing wrote down: the digest, and the files that it drew."""
    path = folder / FOLDER / DIGEST
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
