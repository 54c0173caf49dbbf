"""Curves: how stolen and served accuracy move with a field, with the queries that a thief asks, with the student's size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdbench.board import figures
from kdbench.board.figures import EMPTY, INK, MUTED
from kdbench.board.intervals import Estimate, estimate
from kdbench.board.results import Cell, Status
from kdbench.board.robustness import evasions, title
from kdbench.board.scores import NO_VICTIM, REFERENCE, Match, Standings, victim_by_seed
from kdbench.board.sweeps import Swept, Value

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 4.4, 3.1  # inches
PALETTE = 10  # colours that also the colour-blind can tell apart
MARKERS = "osD^vP*X<>hp"
FIELDS = {"omega": "omega", "temperature": "temperature T", "steps": "distillations", "fraction": "share of the data"}


@dataclass(frozen=True)
class Line:
    """Estimates along an axis; dashed: what does not hang on it."""

    label: str
    values: Sequence[Estimate | None]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes with lines in them; `percent`: whether values are fractions."""

    title: str
    lines: Sequence[Line]
    percent: bool = True

    @property
    def known(self) -> bool:
        """Whether there is anything to draw."""
        return any(value for line in self.lines if not line.dashed for value in line.values)


def of_defense(found: Standings, swept: Swept) -> "Figure":
    """Accuracy as served, stolen accuracy and robustness along a field of a defense."""
    panels = [_served(found, swept), *_stolen(found, swept), *_robustness(found, swept)]
    return _draw(found, swept, [panel for panel in panels if panel.known])


def of_attack(found: Standings, swept: Swept) -> "Figure":
    """Stolen accuracy along a field of an attack, a line a defense."""
    others = swept.others
    panels = []
    for other in others:
        ours = [Line(d.label, swept.along(other, _by_attack(found, d.label))) for d in found.defenses]
        alone = Line(f"{NO_VICTIM}, same data", swept.along(other, found.alone_against), dashed=True)
        panels.append(Panel("Stolen accuracy (%)" + _suffix(swept, other), [*ours, alone]))
    return _draw(found, swept, [panel for panel in panels if panel.known])


def has_query_counts(found: Standings) -> bool:
    """Whether thieves asked some defense different numbers of questions."""
    return any(len({x for x, _ in _asked(found, defense.label)}) > 1 for defense in found.defenses)


def query_efficiency(found: Standings) -> "Figure":
    """Stolen accuracy against the questions answered: a point for each theft that none beats with as many or fewer."""
    import seaborn as sns

    names = [defense.label for defense in found.defenses if _asked(found, defense.label)]
    figure = figures.chart(
        6.6,
        4.0,
        names,
        found,
        "Stolen accuracy against queries",
        "points: thefts that none beats with as many or fewer",
    )
    ax = figure.add_subplot()
    colors = sns.color_palette("colorblind" if len(names) <= PALETTE else "husl", len(names))
    for index, name in enumerate(names):
        points = _front(_asked(found, name))
        style, marker = ("-", "--", ":")[index % 3], MARKERS[index % len(MARKERS)]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        ax.step(xs, ys, marker + style, where="post", color=colors[index], label=name, linewidth=1.4, markersize=6)
    budgets = {float(cell.threat["budget"]) for cell in _cells(found) if cell.defense and cell.threat.get("budget")}
    for budget in budgets:
        ax.axvline(budget, color=MUTED, linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_xlabel("images answered by the oracle" + ("  (dotted: the budget)" if budgets else ""))
    ax.set_ylabel("test accuracy of the student (%)")
    ax.grid(color=EMPTY)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def has_sizes(found: Sequence[Standings]) -> bool:
    """Whether students of several sizes stole."""
    return len({size for size in (_size(student) for student in found) if size}) > 1


def student_sizes(found: Sequence[Standings]) -> "Figure":
    """Stolen accuracy by the best response against the size of the student's network."""
    ordered = sorted((s for s in found if _size(s)), key=lambda s: _size(s) or 0)
    first = ordered[0]
    lines = [Line(d.label, [_best(student, d.label) for student in ordered]) for d in first.defenses]
    lines.append(Line(f"{NO_VICTIM}, all data", [_alone(student) for student in ordered], dashed=True))
    ticks = [f"{student.student}\n{_size(student):,.0f} weights" for student in ordered]
    victims = [cell.metrics["victim_parameters"] for cell in _cells(first) if "victim_parameters" in cell.metrics]
    victim = f"students by size; the victim has {victims[0]:,.0f} weights" if victims else "students by size"
    figure = figures.chart(
        7.5, 3.6, [line.label for line in lines], first, "Students smaller and larger", "best response"
    )
    _panel(figure.add_subplot(), Panel("Stolen accuracy (%)", lines), ticks, victim)
    _legend(figure)
    return figure


def _draw(found: Standings, swept: Swept, panels: Sequence[Panel]) -> "Figure":
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    labels = [line.label for panel in panels for line in panel.lines]
    head = f"{swept.method}: {FIELDS.get(swept.field, swept.field)}"
    note = "bars: 95 % intervals" if len({c.seed for c in _cells(found)}) > 1 else "one seed"
    figure = figures.chart(PANEL[0] * columns, PANEL[1] * rows, labels, found, head, note)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    ticks = [f"{value:g}" if isinstance(value, float) else value for value in swept.values]
    for ax, panel in zip(axes, panels, strict=False):
        _panel(ax, panel, ticks, FIELDS.get(swept.field, swept.field))
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    _legend(figure)
    return figure


def _panel(ax: "Axes", panel: Panel, ticks: Sequence[str], axis: str) -> None:
    """The lines over evenly spaced ticks, each a little beside the others so that bars can be told apart."""
    import seaborn as sns

    solid = [line for line in panel.lines if not line.dashed]
    colors = dict(zip([line.label for line in solid], sns.color_palette("colorblind", len(solid)), strict=True))
    scale = 100 if panel.percent else 1
    for index, line in enumerate(panel.lines):
        shift = 0.0 if line.dashed else 0.12 * ((index + 0.5) / len(solid) - 0.5)
        known = [(place + shift, value) for place, value in enumerate(line.values) if value]
        if known:
            ax.errorbar(
                [x for x, _ in known],
                [scale * value.mean for _, value in known],
                yerr=[scale * (value.half or 0) for _, value in known],
                fmt="--" if line.dashed else f"-{MARKERS[index % len(MARKERS)]}",
                color=INK if line.dashed else colors[line.label],
                elinewidth=0.8,
                capsize=0 if line.dashed else 2,
                linewidth=1.2 if line.dashed else 1.6,
                markersize=5,
                label=line.label,
            )
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlabel(axis)
    ax.set_title(panel.title)
    ax.grid(color=EMPTY)
    ax.set_axisbelow(True)


def _legend(figure: "Figure") -> None:
    """One for all panels, each label once."""
    handles: dict[str, Artist] = {}
    for ax in figure.axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)


def _served(found: Standings, swept: Swept) -> Panel:
    reference = _of_victim(found, "victim_acc")(found.reference or "")
    lines = [
        Line(_named(swept, other, "served"), swept.along(other, _of_victim(found, "victim_acc")))
        for other in swept.others
    ]
    return Panel("Accuracy as served (%)", [*lines, *_constant(REFERENCE, reference, swept.values)])


def _stolen(found: Standings, swept: Swept) -> list[Panel]:
    """By attack where one field varies; by the best response where two do."""
    if swept.other:
        lines = [
            Line(_named(swept, other, ""), swept.along(other, lambda d: _best(found, d))) for other in swept.others
        ]
        reference = _constant(REFERENCE, _best(found, found.reference or ""), swept.values)
        return [Panel("Stolen accuracy, best response (%)", [*lines, *reference])]
    lines = [Line(a.label, swept.along(None, _by_defense(found, a.label))) for a in found.attacks]
    part = next((match.part for match in found.matches.values() if match.part[0]), None)
    baseline = found.baseline(part) if part else None
    alone = baseline.mean("student_acc") if baseline else None
    return [Panel("Stolen accuracy (%)", [*lines, *_constant(NO_VICTIM, alone, swept.values)])]


def _robustness(found: Standings, swept: Swept) -> list[Panel]:
    measures = {f"adv_{name}": f"Accuracy under {title(name)} (%)" for name in evasions(_cells(found), "victim")}
    measures |= {"sensitivity": "Sensitivity of the victim", "cw_l2": "C&W L2 of the victim"}
    panels = []
    for metric, words in measures.items():
        measure = _of_victim(found, f"victim_{metric}")
        lines = [Line(_named(swept, other, "served"), swept.along(other, measure)) for other in swept.others]
        reference = _constant(REFERENCE, measure(found.reference or ""), swept.values)
        panels.append(Panel(words, [*lines, *reference], percent=metric.startswith("adv_")))
    return panels


def _named(swept: Swept, other: Value | None, alone: str) -> str:
    if other is None:
        return alone
    return f"{FIELDS.get(swept.other or '', swept.other)} {other:g}" if isinstance(other, float) else str(other)


def _suffix(swept: Swept, other: Value | None) -> str:
    return "" if other is None else f", {_named(swept, other, '')}"


def _constant(label: str, value: Estimate | None, values: Sequence[Value]) -> list[Line]:
    return [Line(label, [value] * len(values), dashed=True)] if value else []


def _of_victim(found: Standings, metric: str) -> Callable[[str], Estimate | None]:
    def measure(defense: str) -> Estimate | None:
        cells = [cell for match in found.against(defense) for cell in match.cells]
        return estimate(victim_by_seed(cells, metric))

    return measure


def _by_defense(found: Standings, attack: str) -> Callable[[str], Estimate | None]:
    return lambda defense: _score(found.matches.get((defense, attack)))


def _by_attack(found: Standings, defense: str) -> Callable[[str], Estimate | None]:
    return lambda attack: _score(found.matches.get((defense, attack)))


def _score(match: Match | None) -> Estimate | None:
    """Stolen accuracy; past the defense too, for that is what the thief has in the end."""
    if match is None:
        return None
    return match.mean("student_acc") or match.mean("student_acc", Status.BYPASSED)


def _best(found: Standings, defense: str) -> Estimate | None:
    return _score(found.best_response(defense))


def _alone(found: Standings) -> Estimate | None:
    baseline = found.baseline((1.0, 0))
    return baseline.mean("student_acc") if baseline else None


def _asked(found: Standings, defense: str) -> list[tuple[float, float]]:
    """(queries, stolen accuracy in percent) of each theft from `defense` that asked anything and was scored."""
    points = [(match.mean("queries"), match.mean("student_acc")) for match in found.against(defense)]
    return [(queries.mean, 100 * stolen.mean) for queries, stolen in points if queries and queries.mean and stolen]


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The thefts that no other beats with as many questions or fewer."""
    front: list[tuple[float, float]] = []
    for asked, stolen in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or stolen > front[-1][1]:
            front.append((asked, stolen))
    return front


def _size(found: Standings) -> float | None:
    return next((c.metrics["student_parameters"] for c in _cells(found) if "student_parameters" in c.metrics), None)


def _cells(found: Standings) -> list[Cell]:
    return [cell for match in [*found.matches.values(), *found.baselines] for cell in match.cells]
