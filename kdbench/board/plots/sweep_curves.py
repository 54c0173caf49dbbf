"""Curves along a field of a method that a suite sweeps: accuracy of answers and students, and adversarial robustness."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kdbench.board.intervals import Estimate
from kdbench.board.pairing import Pairing
from kdbench.board.plots.lines import Line, Panel, bands_note, chart, constant, draw_panel, legend, styles_of
from kdbench.board.plots.style import LETTER, about, head
from kdbench.board.study import NO_QUERY, UNDEFENDED, Study
from kdbench.board.sweeps import Swept, Value
from kdbench.board.tables.robustness import VICTIM, robust_metrics
from kdbench.records import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL, WIDE = (3.8, 2.8), (6.6, 3.6)  # inches: one of several panels, one that stands alone
FIELDS = {"temperature": "temperature T", "steps": "distillations", "fraction": "share of the data"}


def of_defense(study: Study, swept: Swept) -> list[Panel]:
    """Accuracy of answers and students and robustness along a field of a defense, as far as they are known."""
    served = _of_victim(study, swept, "victim_acc", "Accuracy as served (%)")
    panels = [served, _student_accuracy(study, swept), *_robustness(study, swept)]
    return [panel for panel in panels if panel.known]


def of_attack(study: Study, swept: Swept) -> list[Panel]:
    """Student accuracy along a field of an attack, a line a defense; a panel for each value of the other field."""
    panels = []
    for other in swept.others:
        ours = [Line(d.name, swept.along(other, partial(_of_student, study, d.name))) for d in study.defenses]
        baseline = Line(f"{NO_QUERY}, same data", swept.along(other, study.baseline_of_attack), dashed=True)
        panels.append(Panel("Student accuracy (%)" + _suffix(swept, other), [*ours, baseline]))
    return [panel for panel in panels if panel.known]


def along(study: Study, swept: Swept, panels: Sequence[Panel]) -> "Figure":
    """The panels side by side; those of an attack, which measure the same, have one scale."""
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    fields = [_field(name) for name in (swept.field, swept.other) if name]
    lines = [line for panel in panels for line in panel.lines]
    styles = styles_of(line.name for line in lines if not line.dashed)
    figure = chart(*((PANEL[0] * columns, PANEL[1] * rows) if columns > 1 else WIDE), lines)
    head(figure, f"{swept.method}: {' and '.join(fields)}", about(study), bands_note(study))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=swept.role == "attack").flatten()
    ticks = [f"{value:g}" if isinstance(value, float) else value for value in swept.values]
    for ax, panel in zip(axes, panels, strict=False):
        draw_panel(ax, panel, styles)
        ax.set_xticks(range(len(ticks)), ticks, **_tilt(ticks))
        ax.set_xlabel(fields[0])
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    legend(figure, lines)
    return figure


def _tilt(ticks: Sequence[str]) -> dict[str, Any]:
    """How ticks are written that would run into each other side by side."""
    crowded = LETTER * len(ticks) * (max(map(len, ticks)) + 1) > PANEL[0] - 0.5
    return {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}


def _student_accuracy(study: Study, swept: Swept) -> Panel:
    """By attack where one field varies; under the strongest attack where two do."""
    count = len(swept.values)
    if swept.other:
        under_strongest = partial(score_under_strongest, study)
        lines = [Line(_named(swept, other, ""), swept.along(other, under_strongest)) for other in swept.others]
        undefended = constant(UNDEFENDED, under_strongest(study.reference or ""), count)
        return Panel("Student accuracy, strongest attack (%)", [*lines, *undefended])
    lines = [Line(a.name, swept.along(None, partial(_of_student, study, attack=a.name))) for a in study.attacks]
    subset = next((pairing.subset for pairing in study.pairings.values() if pairing.subset.fraction), None)
    baseline = study.baseline(subset) if subset else None
    accuracy = baseline.mean("student_acc") if baseline else None
    return Panel("Student accuracy (%)", [*lines, *constant(NO_QUERY, accuracy, count)])


def _robustness(study: Study, swept: Swept) -> Iterator[Panel]:
    for name, title in robust_metrics(study.cells, VICTIM).items():
        yield _of_victim(study, swept, name, f"Accuracy under {title} (%)")
    yield _of_victim(study, swept, "victim_sensitivity", "Sensitivity of the victim", percent=False)
    yield _of_victim(study, swept, "victim_cw_l2", "C&W L2 of the victim", percent=False)


def _of_victim(study: Study, swept: Swept, metric: str, words: str, percent: bool = True) -> Panel:
    def measure(defense: str) -> Estimate | None:
        victim = study.victims.get(defense)
        return victim.mean(metric) if victim else None

    lines = [Line(_named(swept, other, VICTIM), swept.along(other, measure)) for other in swept.others]
    undefended = constant(UNDEFENDED, measure(study.reference or ""), len(swept.values))
    return Panel(words, [*lines, *undefended], percent)


def _named(swept: Swept, other: Value | None, alone: str) -> str:
    """The name of a line by the other field's value; alone: where only one field varies."""
    if other is None:
        return alone
    return f"{_field(swept.other or '')} {f'{other:g}' if isinstance(other, float) else other}"


def _field(name: str) -> str:
    return FIELDS.get(name, name)


def _suffix(swept: Swept, other: Value | None) -> str:
    return "" if other is None else f", {_named(swept, other, '')}"


def _of_student(study: Study, defense: str, attack: str) -> Estimate | None:
    return _score(study.pairings.get((defense, attack)))


def score_under_strongest(study: Study, defense: str) -> Estimate | None:
    """Student accuracy under the strongest attack."""
    return _score(study.strongest_attack(defense))


def _score(pairing: Pairing | None) -> Estimate | None:
    """Student accuracy; also where the defense was bypassed, for that is what the attacker has in the end."""
    if pairing is None:
        return None
    return pairing.mean("student_acc") or pairing.mean("student_acc", Status.BYPASSED)
