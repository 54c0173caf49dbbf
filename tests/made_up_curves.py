"""Cells made up for curves, and what a drawn curve shows."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_up_cells import over_seeds
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import ArrayLike

from kdbench.board.intervals import Estimate
from kdbench.board.plots import drawing
from kdbench.board.plots.style import STYLE
from kdbench.board.studies import Studies
from kdbench.records import AttackRecord, Cell, DefenseRecord, MethodRecord

SERVED = [0.94, 0.95, 0.96]


OMEGAS = [0.004, 0.01, 0.04, 0.1]


def record(method: str, **fields: Any) -> MethodRecord:
    """A method under a label that says its fields."""
    return MethodRecord(
        "+".join([method, *(f"{name}-{value}" for name, value in fields.items())]), method, fields, "made up"
    )


def attack_runs(defense: MethodRecord, attack: MethodRecord, accs: Iterable[float], **changes: Any) -> list[Cell]:
    """One cell a seed."""
    against = DefenseRecord(**vars(defense), is_reference=defense.method == "none")
    by = AttackRecord(**vars(attack))
    cells = over_seeds(defense.name, attack.name, accs, **changes)
    return [replace(cell, defense=against, attack=by) for cell in cells]


def robust(strength: float) -> dict[str, float]:
    return {
        "victim_robust_fgsm": 0.5 + 0.01 * strength,
        "victim_robust_pgd": 0.3 + 0.02 * strength,
        "victim_cw_l2": 0.8 + 0.1 * strength,
        "victim_sensitivity": 0.05 - 0.001 * strength,
    }


def omegas() -> list[Cell]:
    """Four omegas of `nasty`, and `none`, against two attacks; a baseline."""
    cells = over_seeds(None, "cross-entropy", [0.80, 0.81, 0.82])
    for attack in (record("kd"), record("hard-label")):
        cells += attack_runs(record("none"), attack, [0.90, 0.91, 0.92], victim_acc=0.97)
        for index, omega in enumerate(OMEGAS):
            accs = [0.9 - 0.05 * index + 0.01 * seed * index for seed in range(3)]
            cells += attack_runs(record("nasty", omega=omega, tau=4.0), attack, accs, victim_acc=SERVED[index % 3])
    return cells


def assistants() -> list[Cell]:
    """Three temperatures by two numbers of steps of a defense, evaluated for robustness."""
    cells = [c for a in ("kd", "tuned") for c in attack_runs(record("none"), record(a), [0.9] * 3, more=robust(0))]
    for temperature in (1.0, 4.0, 20.0):
        for steps in (1, 2):
            defense = record("assistant", temperature=temperature, steps=steps)
            cells += attack_runs(defense, record("kd"), [0.9 - 0.01 * steps] * 3, more=robust(temperature * steps))
            cells += attack_runs(defense, record("tuned"), [0.91 - 0.01 * steps] * 3, more=robust(temperature * steps))
    return cells


def attackers() -> list[Cell]:
    """Three temperatures by two alphas of an attack on two defenses; a baseline."""
    cells = over_seeds(None, "cross-entropy", [0.80, 0.81, 0.82])
    for index, defense in enumerate(("none", "nasty")):
        for temperature in (20.0, 1.0, 4.0):
            for alpha in (0.9, 0.1):
                accs = [0.9 - 0.1 * index - 0.001 * temperature * alpha + 0.01 * seed for seed in range(3)]
                cells += attack_runs(record(defense), record("kd", temperature=temperature, alpha=alpha), accs)
    return cells


def querying() -> list[Cell]:
    """Five attackers who make ever more queries; the third is beaten with fewer queries, the fourth with as many."""
    said = {"a": (100, 0.5), "b": (1000, 0.7), "c": (2000, 0.6), "d": (5000, 0.75), "e": (5000, 0.8), "f": (0, 0.9)}
    return [
        cell
        for defense, loss in (("none", 0.0), ("nasty", 0.1))
        for attack, (asked, acc) in said.items()
        for cell in over_seeds(defense, attack, [acc - loss] * 3, more={"queries": asked})
    ]


def sizes() -> list[Cell]:
    """Three students, in the order of their names the largest, the smallest, the middle."""
    cells = []
    for student, weights, acc in (("a-large", 9000, 0.9), ("b-small", 100, 0.7), ("c-middle", 1000, 0.8)):
        more = {"student_parameters": weights, "victim_parameters": 5000}
        for index, defense in enumerate(("none", "nasty")):
            for attack, gain in (("kd", 0.0), ("tuned", 0.01)):
                cells += over_seeds(defense, attack, [acc - 0.1 * index + gain] * 3, more=more, student=student)
        cells += over_seeds(None, "cross-entropy", [acc - 0.2] * 3, more=more, student=student)
    return cells


def drawn(cells: Iterable[Cell], name: str) -> Figure:
    """The figure of that name, as it is drawn."""
    [plot] = [plot for plot in drawing.plots(Studies.of(cells)) if plot.name == name]
    with style.context(["default", STYLE]):
        return plot.figure()


def panels(figure: Figure) -> dict[str, Axes]:
    """The axes by their titles; places without a panel are left out."""
    return {ax.get_title(): ax for ax in figure.axes if ax.axison}


def bars(ax: Axes) -> dict[str, ErrorbarContainer]:
    """Lines with bars by their labels."""
    return {str(bar.get_label()): bar for bar in ax.containers if isinstance(bar, ErrorbarContainer)}


def ys(ax: Axes, label: str) -> list[float]:
    """The values of the line of that label."""
    own = bars(ax)[label].lines[0] if label in bars(ax) else plain_lines(ax)[label]
    assert own is not None
    return numbers(own.get_ydata())


def numbers(data: ArrayLike) -> list[float]:
    return [float(value) for value in np.asarray(data)]


def plain_lines(ax: Axes) -> dict[str, Line2D]:
    """Lines without bars by their labels."""
    return {str(line.get_label()): line for line in ax.get_lines() if not str(line.get_label()).startswith("_")}


def ticks(ax: Axes) -> list[str]:
    return [text.get_text() for text in seen_ticks(ax)]


def seen_ticks(ax: Axes) -> list[Text]:
    """The labels of the horizontal axis, but for those beyond its ends, which matplotlib has too."""
    left, right = ax.get_xlim()
    return [text for text in ax.get_xticklabels() if left <= text.get_position()[0] <= right]


def legend(figure: Figure) -> list[str]:
    [only_one] = figure.legends
    return [text.get_text() for text in only_one.get_texts()]


def percent(values: Iterable[Estimate | None]) -> Any:
    return pytest.approx([100 * value.mean for value in values if value])
