"""Curves: how stolen and served accuracy move with a field, with the queries that a thief asks, with the student's size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kdbench.board.intervals import Estimate, estimate
from kdbench.board.plots import figures
from kdbench.board.plots.figures import EMPTY, HEAD, INK, LETTER, LINE, MUTED
from kdbench.board.study import NO_QUERY, REFERENCE, Pairing, Study, victim_by_seed
from kdbench.board.sweeps import Swept, Value
from kdbench.board.tables.robustness import robustness_attacks, title
from kdbench.records import Cell, Status

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, WIDE = (3.8, 2.8), (6.6, 3.6)  # inches: one of several panels, one that stands alone
MARKERS = "osD^vP*X<>hp"
Style = tuple[Any, str]  # the colour and the marker of a label, in all panels of a figure
FIELDS = {"temperature": "temperature T", "steps": "distillations", "fraction": "share of the data"}


@dataclass(frozen=True)
class Line:
    """Estimates along an axis; dashed: what does not hang on it."""

    name: str
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


def of_defense(found: Study, swept: Swept) -> list[Panel]:
    """Accuracy as served, stolen accuracy and robustness along a field of a defense, as far as they are known."""
    served = _of_victim(found, swept, "acc", "Accuracy as served (%)")
    panels = [served, _stolen(found, swept), *_robustness(found, swept)]
    return [panel for panel in panels if panel.known]


def of_attack(found: Study, swept: Swept) -> list[Panel]:
    """Stolen accuracy along a field of an attack, a line a defense; a panel for each value of the other field."""
    panels = []
    for other in swept.others:
        ours = [Line(d.name, swept.along(other, partial(_attack_run, found, d.name))) for d in found.defenses]
        baseline_acc = Line(f"{NO_QUERY}, same data", swept.along(other, found.baseline_of_attack), dashed=True)
        panels.append(Panel("Stolen accuracy (%)" + _suffix(swept, other), [*ours, baseline_acc]))
    return [panel for panel in panels if panel.known]


def along(found: Study, swept: Swept, panels: Sequence[Panel]) -> "Figure":
    """The panels side by side; those of an attack, which measure the same, have one scale."""
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    fields = [_field(name) for name in (swept.field, swept.other) if name]
    lines = [line for panel in panels for line in panel.lines]
    styles = _styles(line.name for line in lines if not line.dashed)
    head = f"{swept.method}: {' and '.join(fields)}"
    size = (PANEL[0] * columns, PANEL[1] * rows) if columns > 1 else WIDE
    figure = _chart(*size, lines, found, head, _bars(found))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=swept.role == "attack").flatten()
    ticks = [f"{value:g}" if isinstance(value, float) else value for value in swept.values]
    for ax, panel in zip(axes, panels, strict=False):
        _panel(ax, panel, styles)
        ax.set_xticks(range(len(ticks)), ticks, **_tilt(ticks))
        ax.set_xlabel(fields[0])
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    _legend(figure, lines)
    return figure


def has_query_counts(found: Study) -> bool:
    """Whether thieves asked some defense different numbers of questions."""
    return any(len({x for x, _ in _asked(found, defense.name)}) > 1 for defense in found.defenses)


def query_efficiency(found: Study) -> "Figure":
    """Stolen accuracy against the questions answered: a point for each theft that none beats with as many or fewer."""
    asked = {defense.name: _asked(found, defense.name) for defense in found.defenses}
    styles = _styles(name for name, points in asked.items() if points)
    note = "points: thefts that none beats with as many or fewer"
    lines = [Line(name, []) for name in styles]
    figure = _chart(*WIDE, lines, found, "Stolen accuracy against queries", note)
    ax = figure.add_subplot()
    for index, (name, (color, marker)) in enumerate(styles.items()):
        xs, ys = zip(*_front(asked[name]), strict=True)
        dashes = ("-", "--", ":")[index % 3]
        ax.step(xs, ys, marker + dashes, where="post", color=color, label=name, linewidth=1.4, markersize=6)
    budgets = {float(cell.scenario["budget"]) for cell in _cells(found) if cell.defense and cell.scenario.get("budget")}
    for budget in sorted(budgets):
        ax.axvline(budget, color=MUTED, linestyle=":", linewidth=1)
    _magnitudes(ax)
    ax.set_xlabel("images answered by the oracle" + ("  (dotted: the budget)" if budgets else ""))
    ax.set_ylabel("test accuracy of the student (%)")
    ax.grid(color=EMPTY)
    ax.set_axisbelow(True)
    _legend(figure, lines)
    return figure


def has_sizes(found: Sequence[Study]) -> bool:
    """Whether students of several sizes stole."""
    return len({size for size in (_size(student) for student in found) if size}) > 1


def student_sizes(found: Sequence[Study]) -> "Figure":
    """Stolen accuracy by the best response against the size of the student's network."""
    ordered = sorted((s for s in found if _size(s)), key=lambda s: _size(s) or 0)
    first = ordered[0]
    lines = [Line(d.name, [_best(student, d.name) for student in ordered]) for d in first.defenses]
    lines.append(Line(f"{NO_QUERY}, all data", [_alone(student) for student in ordered], dashed=True))
    everyone = replace(first, student=f"of {len(ordered)} sizes")
    note = "  ·  ".join(filter(None, ["best response", _bars(first)]))
    width = max(WIDE[0], 1.6 * len(ordered))
    figure = _chart(width, WIDE[1], lines, everyone, "Students smaller and larger", note)
    ax = figure.add_subplot()
    _panel(ax, Panel("Stolen accuracy (%)", lines), _styles(line.name for line in lines[:-1]))
    ax.set_xticks(range(len(ordered)), [f"{s.student}\n{_size(s):,.0f} weights" for s in ordered])
    victims = [cell.metrics["victim_parameters"] for cell in _cells(first) if "victim_parameters" in cell.metrics]
    ax.set_xlabel(f"students by size; the victim has {victims[0]:,.0f} weights" if victims else "students by size")
    _legend(figure, lines)
    return figure


def _chart(width: float, height: float, lines: Iterable[Line], found: Study, head: str, note: str) -> "Figure":
    """An empty figure, high enough for a legend of all lines."""
    labels = list(dict.fromkeys(line.name for line in lines))
    return figures.chart(width, max(height, 1.1 * LINE * len(labels) - HEAD), labels, found, head, note)


def _bars(found: Study) -> str:
    return "bars and bands: 95 % intervals" if len({cell.seed for cell in _cells(found)}) > 1 else ""


def _styles(labels: Iterable[str]) -> dict[str, Style]:
    """The first ten colours are such that also the colour-blind can tell them apart."""
    import seaborn as sns

    once = list(dict.fromkeys(labels))
    some = [*sns.color_palette("colorblind"), *sns.color_palette("dark")]
    colors = some if len(once) <= len(some) else sns.color_palette("husl", len(once))
    return {label: (colors[index], MARKERS[index % len(MARKERS)]) for index, label in enumerate(once)}


def _panel(ax: "Axes", panel: Panel, styles: Mapping[str, Style]) -> None:
    """The lines over places 0, 1, …: those with bars a little beside each other, dashed ones with a band."""
    solid = [line for line in panel.lines if not line.dashed]
    scale = 100 if panel.percent else 1
    for line in panel.lines:
        shift = 0.0 if line.dashed else 0.12 * ((solid.index(line) + 0.5) / len(solid) - 0.5)
        known = [(place + shift, value) for place, value in enumerate(line.values) if value]
        xs, means = [x for x, _ in known], [scale * value.mean for _, value in known]
        if known and line.dashed:
            ax.plot(xs, means, "--" if line.name == REFERENCE else "-.", color=INK, linewidth=1.2, label=line.name)
            low, high = [scale * value.low for _, value in known], [scale * value.high for _, value in known]
            ax.fill_between(xs, low, high, color=INK, alpha=0.08, linewidth=0, zorder=0)
        elif known:
            color, marker = styles[line.name]
            halves = [scale * (value.half_width or 0) for _, value in known]
            form: dict[str, Any] = {"capsize": 2, "elinewidth": 0.8, "linewidth": 1.6, "markersize": 5}
            ax.errorbar(xs, means, halves, fmt=f"-{marker}", color=color, label=line.name, **form)
    ax.set_title(panel.title, pad=9)
    ax.grid(color=EMPTY)
    ax.set_axisbelow(True)


def _tilt(ticks: Sequence[str]) -> dict[str, Any]:
    """How labels are written that would run into each other side by side."""
    crowded = LETTER * len(ticks) * (max(map(len, ticks)) + 1) > PANEL[0] - 0.5
    return {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}


def _magnitudes(ax: "Axes") -> None:
    """A logarithmic axis where numbers differ by more than a power of ten, all written out."""
    low, high = ax.dataLim.intervalx
    if high > 10 * low:
        ax.set_xscale("log", subs=[2, 5])
        ax.xaxis.set_minor_formatter("{x:,.0f}" if high < 100 * low else "")
        ax.tick_params(which="minor", length=3.5, pad=3.5)  # as at powers of ten, so that all numbers stand on one line
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _legend(figure: "Figure", lines: Iterable[Line]) -> None:
    """One for all panels: each label once, those of dashed lines last."""
    drawn: dict[str, Artist] = {}
    for ax in figure.axes:
        drawn |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = sorted(dict.fromkeys((line.dashed, line.name) for line in lines), key=lambda named: named[0])
    labels = [label for _, label in ordered if label in drawn]
    figure.legend([drawn[label] for label in labels], labels, loc="outside right upper", frameon=False)


def _stolen(found: Study, swept: Swept) -> Panel:
    """By attack where one field varies; by the best response where two do."""
    if swept.other:
        best = partial(_best, found)
        lines = [Line(_named(swept, other, ""), swept.along(other, best)) for other in swept.others]
        reference = _constant(REFERENCE, best(found.reference or ""), swept.values)
        return Panel("Stolen accuracy, best response (%)", [*lines, *reference])
    lines = [Line(a.name, swept.along(None, partial(_attack_run, found, attack=a.name))) for a in found.attacks]
    part = next((pairing.part for pairing in found.pairings.values() if pairing.part[0]), None)
    baseline = found.baseline(part) if part else None
    baseline_acc = baseline.mean("student_acc") if baseline else None
    return Panel("Stolen accuracy (%)", [*lines, *_constant(NO_QUERY, baseline_acc, swept.values)])


def _robustness(found: Study, swept: Swept) -> Iterator[Panel]:
    for name in robustness_attacks(_cells(found), "victim"):
        yield _of_victim(found, swept, f"adv_{name}", f"Accuracy under {title(name)} (%)")
    yield _of_victim(found, swept, "sensitivity", "Sensitivity of the victim", percent=False)
    yield _of_victim(found, swept, "cw_l2", "C&W L2 of the victim", percent=False)


def _of_victim(found: Study, swept: Swept, metric: str, words: str, percent: bool = True) -> Panel:
    def measure(defense: str) -> Estimate | None:
        cells = [cell for pairing in found.against(defense) for cell in pairing.cells]
        return estimate(victim_by_seed(cells, f"victim_{metric}"))

    lines = [Line(_named(swept, other, "victim"), swept.along(other, measure)) for other in swept.others]
    reference = _constant(REFERENCE, measure(found.reference or ""), swept.values)
    return Panel(words, [*lines, *reference], percent)


def _named(swept: Swept, other: Value | None, baseline_acc: str) -> str:
    if other is None:
        return baseline_acc
    return f"{_field(swept.other or '')} {f'{other:g}' if isinstance(other, float) else other}"


def _field(name: str) -> str:
    return FIELDS.get(name, name)


def _suffix(swept: Swept, other: Value | None) -> str:
    return "" if other is None else f", {_named(swept, other, '')}"


def _constant(label: str, value: Estimate | None, values: Sequence[Value]) -> list[Line]:
    return [Line(label, [value] * len(values), dashed=True)] if value else []


def _attack_run(found: Study, defense: str, attack: str) -> Estimate | None:
    return _score(found.pairings.get((defense, attack)))


def _score(pairing: Pairing | None) -> Estimate | None:
    """Stolen accuracy; past the defense too, for that is what the thief has in the end."""
    if pairing is None:
        return None
    return pairing.mean("student_acc") or pairing.mean("student_acc", Status.BYPASSED)


def _best(found: Study, defense: str) -> Estimate | None:
    return _score(found.strongest_attack(defense))


def _alone(found: Study) -> Estimate | None:
    baseline = found.baseline((1.0, 0))
    return baseline.mean("student_acc") if baseline else None


def _asked(found: Study, defense: str) -> list[tuple[float, float]]:
    """(queries, stolen accuracy in percent) of each theft from `defense` that asked anything and was scored."""
    points = [(pairing.mean("queries"), pairing.mean("student_acc")) for pairing in found.against(defense)]
    return [(queries.mean, 100 * stolen.mean) for queries, stolen in points if queries and queries.mean and stolen]


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The thefts that no other beats with as many questions or fewer."""
    front: list[tuple[float, float]] = []
    for asked, stolen in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or stolen > front[-1][1]:
            front.append((asked, stolen))
    return front


def _size(found: Study) -> float | None:
    return next((c.metrics["student_parameters"] for c in _cells(found) if "student_parameters" in c.metrics), None)


def _cells(found: Study) -> list[Cell]:
    return [cell for pairing in [*found.pairings.values(), *found.baselines] for cell in pairing.cells]
