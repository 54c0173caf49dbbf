"""What protects, by attack and under the strongest one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdbench.board.intervals import Estimate
from kdbench.board.plots.heatmaps import Cells, Colors, heat, why_empty
from kdbench.board.plots.style import INK, MUTED, about, bars_note, figure_for, head, rows_on_axes, tolerance
from kdbench.board.study import DefenseRow, RankStatus, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def has_protection(study: Study) -> bool:
    """Whether the protection of any defense is known."""
    return any(row.protection and row.utility_loss for row in _defending(study))


def protection(study: Study) -> "Figure":
    """Left: protection under the strongest attack, with intervals. Right: a map of the protection by attack."""
    rows, attacks = _defending(study), [attack.name for attack in study.attacks]
    figure = figure_for(4.2 + 0.85 * len(attacks), 0.52 * len(rows), [row.defense.name for row in rows] + attacks)
    grid = figure.add_gridspec(1, 2, width_ratios=[3, 0.85 * len(attacks) + 0.6])
    left, right = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    head(figure, "Protection: what the attacker loses", about(study), f"{bars_note(study)}hollow: {tolerance(study)}")
    _under_strongest(left, rows)
    _by_attack(right, study, rows, attacks)
    return figure


def _defending(study: Study) -> list[DefenseRow]:
    return [row for row in study.rows if not row.defense.is_reference]


def _under_strongest(ax: "Axes", rows: Sequence[DefenseRow]) -> None:
    for index, row in enumerate(rows):
        if row.protection:
            _interval(ax, row.protection, index + 0.5, row.status is RankStatus.ABOVE_TOLERANCE)
    ax.axvline(0, color=MUTED, linewidth=1, zorder=0)
    rows_on_axes(ax, [row.defense.name for row in rows])
    ax.set_title("under the strongest attack")
    ax.set_xlabel("points of accuracy")


def _interval(ax: "Axes", value: Estimate, y: float, hollow: bool) -> None:
    half_width = 100 * value.half_width if value.half_width is not None else None
    face = "white" if hollow else INK
    ax.errorbar(100 * value.mean, y, xerr=half_width, fmt="o", color=INK, mfc=face, capsize=3, markersize=7)


def _by_attack(ax: "Axes", study: Study, rows: Sequence[DefenseRow], attacks: Sequence[str]) -> None:
    scores = [[_protection(study, row, attack) for attack in attacks] for row in rows]
    values = [[100 * score.mean if score else None for score in own] for own in scores]
    texts = [
        [
            _points(score) if score else why_empty(study.pairings.get((row.defense.name, attack)))
            for score, attack in zip(own, attacks, strict=True)
        ]
        for row, own in zip(rows, scores, strict=True)
    ]
    largest = max([abs(value) for line in values for value in line if value is not None] + [1])
    heat(ax, Cells(values, texts), [""] * len(rows), attacks, "points of accuracy", Colors("PuOr", -largest, largest))
    ax.set_title("by attack" + (", ± half of the 95 % interval" if len(study.seeds) > 1 else ""))


def _protection(study: Study, row: DefenseRow, attack: str) -> Estimate | None:
    pairing = study.pairings.get((row.defense.name, attack))
    return study.protection(pairing) if pairing else None


def _points(value: Estimate) -> str:
    mean = f"{round(100 * value.mean, 1) + 0.0:+.1f}"
    return mean if value.half_width is None else f"{mean}\n±{100 * value.half_width:.1f}"
