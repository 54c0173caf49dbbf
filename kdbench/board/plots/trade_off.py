"""What protection costs: utility loss against protection, and the Pareto front."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from kdbench.board.comparisons import Point, pareto_front
from kdbench.board.plots.style import (
    ACCENT,
    EMPTY,
    HEAD,
    INK,
    LINE,
    MUTED,
    about,
    bars_note,
    figure_for,
    head,
    tolerance,
)
from kdbench.board.study import DefenseRow, RankStatus, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def trade_off(study: Study) -> "Figure":
    """Utility loss against protection under the strongest attack, with the Pareto front and the tolerance."""
    rows = [row for row in study.rows if row.protection and row.utility_loss]
    names = [row.defense.name for row in rows]
    figure = figure_for(6.4, max(3.6, 0.24 * len(rows) + 0.8), names, tilted=False)
    ax = figure.add_subplot()
    note = f"{bars_note(study)}line: Pareto front  ·  hollow: {tolerance(study)}"
    head(figure, "What protection costs", about(study), note)
    for row in rows:
        _point(ax, row)
    xs, ys = zip(*pareto_front(_middle(row) for row in rows), strict=True)
    ax.step(xs, ys, where="post", color=ACCENT, linewidth=1.8, zorder=1)
    _shade(ax, 100 * study.tolerance)
    ax.set_xlabel("utility loss (points of accuracy)")
    ax.set_ylabel("protection under the strongest attack (points)")
    gap = LINE / (figure.get_figheight() - HEAD - 0.6)
    _names_on_the_right(ax, gap, [(row.defense.name, _middle(row)) for row in rows])
    return figure


def _point(ax: "Axes", row: DefenseRow) -> None:
    assert row.protection
    assert row.utility_loss
    x, y = _middle(row)
    wide, high = (100 * e.half_width if e.half_width is not None else None for e in (row.utility_loss, row.protection))
    face = "white" if row.status is RankStatus.ABOVE_TOLERANCE else INK
    ax.errorbar(x, y, xerr=wide, yerr=high, fmt="o", color=INK, mfc=face, ecolor=MUTED, elinewidth=1, markersize=7)


def _middle(row: DefenseRow) -> Point:
    assert row.protection
    assert row.utility_loss
    return 100 * row.utility_loss.mean, 100 * row.protection.mean


def _shade(ax: "Axes", beyond: float) -> None:
    left, right = ax.get_xlim()
    right = max(right, beyond + 0.05 * (beyond - left))
    ax.axvspan(beyond, right, color=EMPTY, zorder=0, linewidth=0)
    ax.set_xlim(left, right)


def _names_on_the_right(ax: "Axes", gap: float, points: Sequence[tuple[str, Point]]) -> None:
    """Names beside the axes, `gap` of its height apart, each tied to its point."""
    low, high = ax.get_ylim()
    ordered = sorted(points, key=lambda item: item[1][1])
    places = spread_apart([(point[1] - low) / (high - low) for _, point in ordered], gap)
    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "linestyle": ":", "shrinkB": 5}
    for (name, point), place in zip(ordered, places, strict=True):
        where = (1.05, place)
        ax.annotate(name, point, where, textcoords="axes fraction", va="center", arrowprops=line, annotation_clip=False)


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0,1], moved as little as possible until neighbours are `gap` apart."""
    blocks: list[list[float]] = []  # of neighbours that touch; each block lies where its members would be on average
    for index, place in enumerate(places):
        blocks.append([place - index * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    moved = [fmean(block) for block in blocks for _ in block]
    room = 1 - gap * (len(places) - 1)
    return [min(max(place, 0), max(room, 0)) + index * gap for index, place in enumerate(moved)]
