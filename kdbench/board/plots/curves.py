"""Curves of student accuracy against the queries that an attacker makes, and against the size of the student."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdbench.board.comparisons import Point, pareto_front
from kdbench.board.intervals import Estimate
from kdbench.board.plots.lines import Line, Panel, bands_note, chart, draw_panel, legend, styles_of
from kdbench.board.plots.style import EMPTY, MUTED, about, head
from kdbench.board.plots.sweep_curves import WIDE, score_under_strongest
from kdbench.board.study import NO_QUERY, Study
from kdbench.records import SubsetRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL_DATA = SubsetRecord()


def has_query_counts(study: Study) -> bool:
    """Whether attackers of some defense made different numbers of queries."""
    return any(len({x for x, _ in _queried(study, defense.name)}) > 1 for defense in study.defenses)


def query_efficiency(study: Study) -> "Figure":
    """Student accuracy against the queries answered: a point for each attack that none beats with as many or fewer."""
    points = {defense.name: _queried(study, defense.name) for defense in study.defenses}
    styles = styles_of(name for name, own in points.items() if own)
    lines = [Line(name, []) for name in styles]
    figure = chart(*WIDE, lines)
    note = "points: attacks that none beats with as many queries or fewer"
    head(figure, "Student accuracy against queries", about(study), note)
    ax = figure.add_subplot()
    for index, (name, (color, marker)) in enumerate(styles.items()):
        xs, ys = zip(*pareto_front(points[name]), strict=True)
        dashes = ("-", "--", ":")[index % 3]
        ax.step(xs, ys, marker + dashes, where="post", color=color, label=name, linewidth=1.4, markersize=6)
    budgets = {cell.scenario.budget for cell in study.cells if cell.defense and cell.scenario.budget}
    for budget in sorted(budgets):
        ax.axvline(budget, color=MUTED, linestyle=":", linewidth=1)
    _magnitudes(ax)
    ax.set_xlabel("images answered by the oracle" + ("  (dotted: the budget)" if budgets else ""))
    ax.set_ylabel("test accuracy of the student (%)")
    ax.grid(color=EMPTY)
    ax.set_axisbelow(True)
    legend(figure, lines)
    return figure


def has_sizes(studies: Sequence[Study]) -> bool:
    """Whether there are students of several sizes."""
    return len({size for size in (_size(study) for study in studies) if size}) > 1


def student_sizes(studies: Sequence[Study]) -> "Figure":
    """Student accuracy under the strongest attack against the size of the student's network."""
    ordered = sorted((study for study in studies if _size(study)), key=lambda study: _size(study) or 0)
    first = ordered[0]
    lines = [Line(d.name, [score_under_strongest(study, d.name) for study in ordered]) for d in first.defenses]
    lines.append(Line(f"{NO_QUERY}, all data", [_baseline(study) for study in ordered], dashed=True))
    figure = chart(max(WIDE[0], 1.6 * len(ordered)), WIDE[1], lines)
    everyone = Study(f"of {len(ordered)} sizes", first.scenario, first.cells)
    note = "  ·  ".join(filter(None, ["strongest attack", bands_note(first)]))
    head(figure, "Students smaller and larger", about(everyone), note)
    ax = figure.add_subplot()
    draw_panel(ax, Panel("Student accuracy (%)", lines), styles_of(line.name for line in lines[:-1]))
    ax.set_xticks(range(len(ordered)), [f"{s.student}\n{_size(s):,.0f} weights" for s in ordered])
    victims = [cell.metrics["victim_parameters"] for cell in first.cells if "victim_parameters" in cell.metrics]
    ax.set_xlabel(f"students by size; the victim has {victims[0]:,.0f} weights" if victims else "students by size")
    legend(figure, lines)
    return figure


def _magnitudes(ax: "Axes") -> None:
    """A logarithmic axis where numbers differ by more than a power of ten, all written out."""
    low, high = ax.dataLim.intervalx
    if high > 10 * low:
        ax.set_xscale("log", subs=[2, 5])
        ax.xaxis.set_minor_formatter("{x:,.0f}" if high < 100 * low else "")
        ax.tick_params(which="minor", length=3.5, pad=3.5)  # as at powers of ten, so that all numbers stand on one line
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _baseline(study: Study) -> Estimate | None:
    baseline = study.baseline(ALL_DATA)
    return baseline.mean("student_acc") if baseline else None


def _queried(study: Study, defense: str) -> list[Point]:
    """(queries, student accuracy in percent) of each attack on `defense` that made queries and was scored."""
    points = [(pairing.mean("queries"), pairing.mean("student_acc")) for pairing in study.against(defense)]
    return [(queries.mean, 100 * acc.mean) for queries, acc in points if queries and queries.mean and acc]


def _size(study: Study) -> float | None:
    return next((c.metrics["student_parameters"] for c in study.cells if "student_parameters" in c.metrics), None)
