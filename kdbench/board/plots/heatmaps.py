"""Maps of one metric, defense by attack: the accuracy of students, and the transfer of adversarial examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdbench.board.intervals import Estimate
from kdbench.board.pairing import Pairing
from kdbench.board.plots.style import ACCENT, EMPTY, INK, about, figure_for, head, order
from kdbench.board.study import NO_QUERY, Study
from kdbench.records import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def has_student_accuracy(study: Study) -> bool:
    """Whether any attack run was scored."""
    return any(pairing.mean("student_acc") for pairing in study.pairings.values())


def has_transfer(study: Study) -> bool:
    """Whether adversarial examples of any student were tried on its victim."""
    return any(pairing.mean("transfer") for pairing in study.pairings.values())


def student_accuracy(study: Study) -> "Figure":
    """Student accuracy by defense and attack, and what the attacker reaches without queries."""
    defenses, attacks = order(study), [attack.name for attack in study.attacks]
    baselines = {attack: study.baseline_of_attack(attack) for attack in attacks}
    note = "outlined: strongest attack" + (f"  ·  °: not above the {NO_QUERY}" if any(baselines.values()) else "")
    chart = _Map(study, defenses, attacks, "student_acc", "test accuracy of the student (%)", baselines)
    figure, ax = chart.draw("Student accuracy", f"{note}  ·  grey: no score")
    for row, defense in enumerate(defenses):
        if found := study.strongest_attack(defense):
            _outline(ax, attacks.index(found.attack.name), row)
    return figure


def transfer_map(study: Study) -> "Figure":
    """How often adversarial examples made on the student fool the victim."""
    attacks = [attack.name for attack in study.attacks]
    chart = _Map(study, order(study), attacks, "transfer", "adversarial examples that fool the victim (%)", {})
    return chart.draw("Transfer from student to victim", "grey: not measured, or no score")[0]


@dataclass(frozen=True)
class Colors:
    """A colour map that also the colour-blind can read, and the values at its ends."""

    map: str
    low: float
    high: float


@dataclass(frozen=True)
class Cells:
    """The rows of a map: values (None: nothing was measured) and what is written on them."""

    values: Sequence[Sequence[float | None]]
    texts: Sequence[Sequence[str]]


def heat(ax: "Axes", cells: Cells, rows: Sequence[str], columns: Sequence[str], unit: str, colors: Colors) -> None:
    """A map with a text in every cell; cells without a value stay grey.

    seaborn chooses black or white for the texts by the colour below them. It writes nothing on cells without a value.
    """
    import numpy as np
    import seaborn as sns

    values = np.array(cells.values, dtype=float)
    unknown = np.isnan(values)
    ax.set_facecolor(EMPTY)
    sns.heatmap(
        values,
        mask=unknown,
        annot=np.array(cells.texts, dtype=object),
        fmt="",
        annot_kws={"fontsize": 9},
        cmap=colors.map,
        vmin=colors.low,
        vmax=colors.high,
        linewidths=1.5,
        linecolor="white",
        cbar_kws={"label": unit, "fraction": 0.06, "pad": 0.02, "aspect": 30},
        ax=ax,
    )
    for row, column in np.argwhere(unknown):
        text = cells.texts[row][column]
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=INK)
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0)
    ax.tick_params(length=0)


def why_empty(pairing: Pairing | None, metric: str = "") -> str:
    """What is written where there is no value; metric: whose value of bypassed cells stands there in parentheses."""
    if pairing is None:
        return ""
    bypassed = pairing.mean(metric, Status.BYPASSED)
    if bypassed:
        return f"bypassed\n({100 * bypassed.mean:.1f})"
    return next((s.value for s in (Status.FAILED, Status.SKIPPED, Status.BYPASSED) if pairing.count(s)), "")


@dataclass(frozen=True)
class _Map:
    """A heat map of one metric, defense by attack, with a last row of the no-query baselines, if there are any."""

    study: Study
    defenses: Sequence[str]
    attacks: Sequence[str]
    metric: str
    unit: str
    baselines: Mapping[str, Estimate | None]

    def draw(self, title: str, note: str) -> "tuple[Figure, Axes]":
        """The figure and its axes: a cell is a unit square, the first defense at the top."""
        rows = [*self.defenses, *([NO_QUERY] if any(self.baselines.values()) else [])]
        figure = figure_for(1.3 + 0.8 * len(self.attacks), 0.46 * len(rows), [*rows, *self.attacks])
        head(figure, title, about(self.study), note)
        ax = figure.add_subplot()
        values = [[self._value(row, attack) for attack in self.attacks] for row in rows]
        texts = [[self._text(row, attack) for attack in self.attacks] for row in rows]
        heat(ax, Cells(values, texts), rows, self.attacks, self.unit, self._colors(values))
        if len(rows) > len(self.defenses):
            ax.axhline(len(self.defenses), color="white", linewidth=6, zorder=2)
        return figure, ax

    def _colors(self, values: Sequence[Sequence[float | None]]) -> Colors:
        """From the lowest to the highest value of a defense; baselines may lie outside."""
        scores = [value for row in values[: len(self.defenses)] for value in row if value is not None]
        return Colors("cividis", min(scores), max(*scores, min(scores) + 1))

    def _value(self, row: str, attack: str) -> float | None:
        """In percent."""
        if row == NO_QUERY:
            value = self.baselines.get(attack)
        else:
            pairing = self.study.pairings.get((row, attack))
            value = pairing.mean(self.metric) if pairing else None
        return 100 * value.mean if value else None

    def _text(self, row: str, attack: str) -> str:
        pairing = self.study.pairings.get((row, attack))
        value = self._value(row, attack)
        if value is None:
            return why_empty(pairing, self.metric)
        gain = self.study.gain(pairing) if pairing and self.baselines else None
        return f"{value:.1f}" + ("°" if gain and gain.mean <= 0 else "") + self._seeds(pairing)

    def _seeds(self, pairing: Pairing | None) -> str:
        """A warning where seeds are missing."""
        value = pairing.mean(self.metric) if pairing else None
        return f"\nn = {value.n}" if value and value.n < len(self.study.seeds) else ""


def _outline(ax: "Axes", column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=ACCENT, linewidth=2.2, zorder=3, clip_on=False))
