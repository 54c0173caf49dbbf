"""What all figures share: colours, letters, sizes, and the head that says what was run."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kdbench.board.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "kdbench",  # identifiers in an SVG are random otherwise
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 110,
}
INK, QUIET, MUTED, EMPTY, ACCENT = "#222222", "#555555", "#8c8c8c", "#ebebeb", "#d55e00"
LETTER, LINE, HEAD, NARROWEST = 0.085, 0.2, 0.75, 6.0  # inches: a letter, a line, the head of a figure, a figure


def canvas(width: float, height: float) -> "Figure":
    """A figure of at least that size in inches, with room for a head; seaborn measures texts on it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    total = height + HEAD
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - HEAD / total))
    figure = Figure(figsize=(max(width, NARROWEST), total), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def figure_for(width: float, height: float, names: Iterable[str], tilted: bool = True) -> "Figure":
    """A figure with room for axes of `width` x `height` inches beside these names.

    tilted: whether the names stand below the axes, too.
    """
    longest = LETTER * max(len(name) for name in names)
    return canvas(width + longest, max(height, 1.5) + 0.6 + (0.7 * longest if tilted else 0))


def head(figure: "Figure", title: str, about: str, note: str) -> None:
    """The title of a figure, what was run, and how to read it."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    place = 0.06 / width
    figure.text(place, 1 - 0.08 / height, title, va="top", fontsize=12, weight="bold", color=INK)
    figure.text(place, 1 - 0.34 / height, f"{about}\n{note}", va="top", fontsize=9, color=QUIET)


def about(study: Study) -> str:
    """What was run, in a line."""
    cell, seeds = study.cells[0], len(study.seeds)
    scenario = "" if study.scenario == "default" else f", scenario {study.scenario}"
    said = f"{cell.dataset}, victim {cell.victim}, student {study.student}{scenario}"
    return f"{said}, n = {seeds} seed{'s' * (seeds > 1)}"


def bars_note(study: Study) -> str:
    """What the bars are; with one seed there are none."""
    return "bars: 95 % intervals  ·  " if len(study.seeds) > 1 else ""


def tolerance(study: Study) -> str:
    """What is drawn hollow."""
    return f"utility loss above the tolerance of {100 * study.tolerance:g} points"


def order(study: Study) -> list[str]:
    """The defenses as figures show them: the undefended victim first, then as on the board."""
    return sorted((row.defense.name for row in study.rows), key=lambda name: name != study.reference)


def rows_on_axes(ax: "Axes", names: list[str]) -> None:
    """Names beside rows of height 1, the first at the top."""
    ax.set_ylim(len(names), 0)
    ax.set_yticks([row + 0.5 for row in range(len(names))], names)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=EMPTY)
    ax.set_axisbelow(True)
