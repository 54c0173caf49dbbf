"""One figure a question: how much is stolen, what protects, at what cost, and what robustness is left."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kdbench.board.intervals import Estimate, estimate
from kdbench.board.study import NO_QUERY, REFERENCE, DefenseRow, Pairing, RankStatus, Study, victim_by_seed
from kdbench.board.tables.robustness import STUDENT, VICTIM, robustness_attacks, title
from kdbench.records import Cell, Status

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


def has_attack_runs(found: Study) -> bool:
    """Whether any theft was scored."""
    return any(pairing.mean("student_acc") for pairing in found.pairings.values())


def has_protections(found: Study) -> bool:
    """Whether the protection of any defense is known."""
    return any(row.protection and row.utility_loss for row in _defending(found))


def has_robustness(found: Study) -> bool:
    """Whether any victim was tried for robustness."""
    return bool(robustness_attacks(_cells(found), VICTIM))


def has_transfers(found: Study) -> bool:
    """Whether adversarial examples of any student were tried on its victim."""
    return any(pairing.mean("transfer") for pairing in found.pairings.values())


def student_accuracy(found: Study) -> "Figure":
    """A map: student accuracy by defense and attack, and what the thief reaches alone."""
    defenses, attacks = _order(found), [attack.name for attack in found.attacks]
    chosen = [found.strongest_attack(defense) for defense in defenses]
    alone = {attack: found.baseline_of_attack(attack) for attack in attacks}
    note = "outlined: best response" + (f"  ·  °: not above '{NO_QUERY}'" if any(alone.values()) else "")
    chart = _Map(found, defenses, attacks, "student_acc", "test accuracy of the student (%)", alone)
    figure, ax = chart.draw("Stolen accuracy", f"{note}  ·  grey: no score")
    for pairing in chosen:
        if pairing and pairing.defense:
            _outline(ax, attacks.index(pairing.attack.name), defenses.index(pairing.defense.name))
    return figure


def transfer(found: Study) -> "Figure":
    """A map: how often adversarial examples made on the student fool the victim."""
    attacks = [attack.name for attack in found.attacks]
    chart = _Map(found, _order(found), attacks, "transfer", "adversarial examples that fool the victim (%)", {})
    return chart.draw("Transfer from student to victim", "grey: not measured, or no score")[0]


def protection(found: Study) -> "Figure":
    """Left: protection under the best response, with intervals. Right: a map of the protection by attack."""
    rows, attacks = _defending(found), [attack.name for attack in found.attacks]
    figure = _figure(4.2 + 0.85 * len(attacks), 0.52 * len(rows), [e.defense.name for e in rows] + attacks)
    grid = figure.add_gridspec(1, 2, width_ratios=[3, 0.85 * len(attacks) + 0.6])
    left = figure.add_subplot(grid[0])
    right = figure.add_subplot(grid[1])
    _head(figure, found, "Protection: what the thief loses", f"{_bars(found)}hollow: {_tolerance(found)}")
    _protection_by_best_response(left, rows)
    _protection_by_attack(right, found, rows, attacks)
    return figure


def trade_off(found: Study) -> "Figure":
    """Utility loss against protection under the best response, with the Pareto front and the tolerance."""
    rows = [row for row in found.rows() if row.protection and row.utility_loss]
    labels = [row.defense.name for row in rows]
    figure = _figure(6.4, max(3.6, 0.24 * len(rows) + 0.8), labels, tilted=False)
    ax = figure.add_subplot()
    _head(figure, found, "What protection costs", f"{_bars(found)}line: Pareto front  ·  hollow: {_tolerance(found)}")
    for row in rows:
        _point(ax, row)
    _front(ax, rows)
    _shade(ax, 100 * found.tolerance)
    ax.set_xlabel("utility loss (points of accuracy)")
    ax.set_ylabel("protection under the best response (points)")
    gap = LINE / (figure.get_figheight() - HEAD - 0.6)
    _label_on_the_right(ax, gap, [(row.defense.name, _middle(row)) for row in rows])
    return figure


def adversarial_accuracy(found: Study) -> "Figure":
    """Adversarial accuracy of victims, and of the students of the best response, by defense."""
    defenses = _order(found)
    names = robustness_attacks(_cells(found), VICTIM)
    figure = _figure(8.2, 0.22 * (len(names) + 1) * len(defenses), defenses, tilted=False)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _head(figure, found, "Adversarial accuracy", f"{_bars(found)}white box")
    _dots(left, defenses, {name: [_of_victim(found, d, name) for d in defenses] for name in names})
    _dots(right, defenses, {name: [_of_attacker(found, d, name) for d in defenses] for name in names})
    left.set_title("victims as hardened")
    right.set_title("students of the best response")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    return figure


@dataclass(frozen=True)
class _Colors:
    """A colour map that also the colour-blind can read, and the values at its ends."""

    map: str
    low: float
    high: float

    def ink(self, value: float) -> str:
        """Black or white, whichever stands out more against the colour of `value`."""
        from matplotlib import colormaps

        red, green, blue, _ = colormaps[self.map]((value - self.low) / (self.high - self.low))
        luminance = 0.2126 * _linear(red) + 0.7152 * _linear(green) + 0.0722 * _linear(blue)
        return "black" if luminance > 0.25 else "white"


def _linear(channel: float) -> float:
    """A channel of a screen's colour, in [0,1], as an amount of light."""
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)


@dataclass(frozen=True)
class _Map:
    """A heat map of one metric, defense by attack, with a last row of numbers that need no victim."""

    found: Study
    defenses: Sequence[str]
    attacks: Sequence[str]
    metric: str
    unit: str
    alone: Mapping[str, Estimate | None]

    def draw(self, title: str, note: str) -> "tuple[Figure, Axes]":
        """The figure and its axes: a cell is a unit square, the first defense at the top."""
        rows = [*self.defenses, *([NO_QUERY] if any(self.alone.values()) else [])]
        figure = _figure(1.3 + 0.8 * len(self.attacks), 0.46 * len(rows), [*rows, *self.attacks])
        _head(figure, self.found, title, note)
        ax = figure.add_subplot()
        values = [[self._value(row, attack) for attack in self.attacks] for row in rows]
        texts = [[self._text(row, attack) for attack in self.attacks] for row in rows]
        _heat(ax, values, texts, rows, self.attacks, self.unit, self._colors(values))
        if len(rows) > len(self.defenses):
            ax.axhline(len(self.defenses), color="white", linewidth=6, zorder=2)
        return figure, ax

    def _colors(self, values: Sequence[Sequence[float | None]]) -> _Colors:
        """From the lowest to the highest score of a defense; what needs no victim may lie outside."""
        scores = [value for row in values[: len(self.defenses)] for value in row if value is not None]
        return _Colors("cividis", min(scores), max(*scores, min(scores) + 1))

    def _value(self, row: str, attack: str) -> float | None:
        if row == NO_QUERY:
            value = self.alone.get(attack)
        else:
            pairing = self.found.pairings.get((row, attack))
            value = pairing.mean(self.metric) if pairing else None
        return 100 * value.mean if value else None

    def _text(self, row: str, attack: str) -> str:
        pairing = self.found.pairings.get((row, attack))
        value = self._value(row, attack)
        if value is None:
            return _why_empty(pairing, self.metric)
        gain = self.found.gain(pairing) if pairing and self.alone else None
        return f"{value:.1f}" + ("°" if gain and gain.mean <= 0 else "") + _few(self.found, pairing, self.metric)


def _why_empty(pairing: Pairing | None, metric: str = "") -> str:
    if pairing is None:
        return ""
    past = pairing.mean(metric, Status.BYPASSED)
    if past:
        return f"bypassed\n({100 * past.mean:.1f})"
    return next((s.value for s in (Status.FAILED, Status.SKIPPED, Status.BYPASSED) if pairing.count(s)), "")


def _few(found: Study, pairing: Pairing | None, metric: str) -> str:
    """A warning where seeds are missing."""
    value = pairing.mean(metric) if pairing else None
    return f"\nn = {value.n}" if value and value.n < _seeds(found) else ""


def _heat(
    ax: "Axes",
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    colors: _Colors,
) -> None:
    """A map with a text in every cell; cells without a value stay grey."""
    import numpy as np
    import seaborn as sns

    data = np.array(values, dtype=float)
    known = np.isfinite(data)
    ax.set_facecolor(EMPTY)
    sns.heatmap(
        data,
        mask=~known,
        cmap=colors.map,
        vmin=colors.low,
        vmax=colors.high,
        linewidths=1.5,
        linecolor="white",
        cbar_kws={"label": unit, "fraction": 0.06, "pad": 0.02, "aspect": 30},
        ax=ax,
    )
    for row, column in np.ndindex(data.shape):
        value = values[row][column]
        size, color = (8, INK) if value is None else (9, colors.ink(value))
        ax.text(column + 0.5, row + 0.5, texts[row][column], ha="center", va="center", fontsize=size, color=color)
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0)
    ax.tick_params(length=0)


def _outline(ax: "Axes", column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=ACCENT, linewidth=2.2, zorder=3, clip_on=False))


def _protection_by_best_response(ax: "Axes", rows: Sequence[DefenseRow]) -> None:
    for index, row in enumerate(rows):
        if row.protection:
            _interval(ax, row.protection, index + 0.5, row.standing is RankStatus.LOSSY)
    ax.axvline(0, color=MUTED, linewidth=1, zorder=0)
    ax.set_ylim(len(rows), 0)
    ax.set_yticks([row + 0.5 for row in range(len(rows))], [row.defense.name for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=EMPTY)
    ax.set_axisbelow(True)
    ax.set_title("under the best response")
    ax.set_xlabel("points of accuracy")


def _interval(ax: "Axes", value: Estimate, y: float, hollow: bool) -> None:
    half_width = 100 * value.half_width if value.half_width is not None else None
    face = "white" if hollow else INK
    ax.errorbar(100 * value.mean, y, xerr=half_width, fmt="o", color=INK, mfc=face, capsize=3, markersize=7)


def _protection_by_attack(ax: "Axes", found: Study, rows: Sequence[DefenseRow], attacks: Sequence[str]) -> None:
    scores = [[_protection_of(found, row, attack) for attack in attacks] for row in rows]
    values = [[100 * score.mean if score else None for score in own] for own in scores]
    texts = [
        [
            _points(score) if score else _why_empty(found.pairings.get((row.defense.name, attack)))
            for score, attack in zip(own, attacks, strict=True)
        ]
        for row, own in zip(rows, scores, strict=True)
    ]
    span = max([abs(value) for line in values for value in line if value is not None] + [1])
    colors = _Colors("PuOr", -span, span)
    _heat(ax, values, texts, [""] * len(rows), attacks, "points of accuracy", colors)
    ax.set_title("by attack" + (", ± half of the 95 % interval" if _seeds(found) > 1 else ""))


def _protection_of(found: Study, row: DefenseRow, attack: str) -> Estimate | None:
    pairing = found.pairings.get((row.defense.name, attack))
    return found.protection(pairing) if pairing else None


def _points(value: Estimate) -> str:
    mean = f"{round(100 * value.mean, 1) + 0.0:+.1f}"
    return mean if value.half_width is None else f"{mean}\n±{100 * value.half_width:.1f}"


def _point(ax: "Axes", row: DefenseRow) -> None:
    assert row.protection
    assert row.utility_loss
    x, y = _middle(row)
    wide, high = (100 * e.half_width if e.half_width is not None else None for e in (row.utility_loss, row.protection))
    face = "white" if row.standing is RankStatus.LOSSY else INK
    ax.errorbar(x, y, xerr=wide, yerr=high, fmt="o", color=INK, mfc=face, ecolor=MUTED, elinewidth=1, markersize=7)


def _middle(row: DefenseRow) -> tuple[float, float]:
    assert row.protection
    assert row.utility_loss
    return 100 * row.utility_loss.mean, 100 * row.protection.mean


def _front(ax: "Axes", rows: Sequence[DefenseRow]) -> None:
    """A step line through the defenses that no other beats in both."""
    points = sorted((_middle(row) for row in rows), key=lambda p: (p[0], -p[1]))
    front: list[tuple[float, float]] = []
    for point in points:
        if not front or point[1] > front[-1][1]:
            front.append(point)
    ax.step([x for x, _ in front], [y for _, y in front], where="post", color=ACCENT, linewidth=1.8, zorder=1)


def _shade(ax: "Axes", beyond: float) -> None:
    left, right = ax.get_xlim()
    right = max(right, beyond + 0.05 * (beyond - left))
    ax.axvspan(beyond, right, color=EMPTY, zorder=0, linewidth=0)
    ax.set_xlim(left, right)


def _label_on_the_right(ax: "Axes", gap: float, points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Names beside the axes, `gap` of its height apart, each tied to its point."""
    low, high = ax.get_ylim()
    ordered = sorted(points, key=lambda item: item[1][1])
    places = _spread([(point[1] - low) / (high - low) for _, point in ordered], gap)
    for (label, point), place in zip(ordered, places, strict=True):
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "linestyle": ":", "shrinkB": 5}
        ax.annotate(
            label, point, (1.05, place), textcoords="axes fraction", va="center", arrowprops=line, annotation_clip=False
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0,1], moved as little as possible until neighbours are `gap` apart."""
    blocks: list[list[float]] = []  # of neighbours that touch; each block lies where its members wish to be on average
    for index, place in enumerate(places):
        blocks.append([place - index * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    moved = [fmean(block) for block in blocks for _ in block]
    room = 1 - gap * (len(places) - 1)
    return [min(max(place, 0), max(room, 0)) + index * gap for index, place in enumerate(moved)]


def _dots(ax: "Axes", rows: Sequence[str], series: Mapping[str, Sequence[Estimate | None]]) -> None:
    """A dot with its interval for each series in each row."""
    import seaborn as sns

    colors = sns.color_palette("colorblind", len(series))
    for index, (name, values) in enumerate(series.items()):
        shift = (index + 1) / (len(series) + 1)
        known = [(row + shift, value) for row, value in enumerate(values) if value]
        if known:
            ax.errorbar(
                [100 * value.mean for _, value in known],
                [y for y, _ in known],
                xerr=[100 * (value.half_width or 0) for _, value in known],
                fmt="osD^v"[index % 5],
                color=colors[index],
                label=title(name),
                capsize=2,
                markersize=6,
            )
    for row in range(1, len(rows)):
        ax.axhline(row, color=EMPTY, linewidth=1, zorder=0)
    ax.set_ylim(len(rows), 0)
    ax.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=EMPTY)
    ax.set_axisbelow(True)
    ax.set_xlabel("accuracy under attack (%)")


def _of_victim(found: Study, defense: str, robustness: str) -> Estimate | None:
    cells = [cell for pairing in found.against(defense) for cell in pairing.cells]
    return estimate(victim_by_seed(cells, f"{VICTIM}_adv_{robustness}"))


def _of_attacker(found: Study, defense: str, robustness: str) -> Estimate | None:
    pairing = found.strongest_attack(defense)
    return pairing.mean(f"{STUDENT}_adv_{robustness}") if pairing else None


def chart(width: float, height: float, labels: Iterable[str], found: Study, title: str, note: str) -> "Figure":
    """An empty figure for axes of `width` x `height` inches beside a legend of `labels`, with its head."""
    figure = _figure(width, height, labels, tilted=False)
    _head(figure, found, title, note)
    return figure


def _figure(width: float, height: float, labels: Iterable[str], tilted: bool = True) -> "Figure":
    """A figure with room for a map or a chart of `width` x `height` inches, its labels, and its head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    longest = LETTER * max(len(label) for label in labels)
    total = max(height, 1.5) + HEAD + 0.6 + (0.7 * longest if tilted else 0)
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - HEAD / total))
    figure = Figure(figsize=(max(width + longest, NARROWEST), total), layout=layout)
    FigureCanvasAgg(figure)  # seaborn measures texts on it
    return figure


def _head(figure: "Figure", found: Study, title: str, note: str) -> None:
    cell = _cells(found)[0]
    seeds = _seeds(found)
    about = f"{cell.dataset}, victim {cell.victim}, student {found.student}, n = {seeds} seed{'s' * (seeds > 1)}"
    height = figure.get_figheight()
    figure.text(0.06 / figure.get_figwidth(), 1 - 0.08 / height, title, va="top", fontsize=12, weight="bold", color=INK)
    figure.text(0.06 / figure.get_figwidth(), 1 - 0.34 / height, f"{about}\n{note}", va="top", fontsize=9, color=QUIET)


def _bars(found: Study) -> str:
    return "bars: 95 % intervals  ·  " if _seeds(found) > 1 else ""


def _tolerance(found: Study) -> str:
    return f"utility loss above the tolerance of {100 * found.tolerance:g} points"


def _defending(found: Study) -> list[DefenseRow]:
    return [row for row in found.rows() if row.defense.method != REFERENCE]


def _order(found: Study) -> list[str]:
    """The reference first, then as on the board."""
    labels = [row.defense.name for row in found.rows()]
    return sorted(labels, key=lambda label: label != found.reference)


def _cells(found: Study) -> list[Cell]:
    return [cell for pairing in [*found.pairings.values(), *found.baselines] for cell in pairing.cells]


def _seeds(found: Study) -> int:
    return len({cell.seed for cell in _cells(found)})
