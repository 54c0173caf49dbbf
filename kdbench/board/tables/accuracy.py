"""The accuracy board: who keeps what from thieves."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from kdbench.board.document import Board, Column, Kind, Row, Table, interval_note, text
from kdbench.board.study import NO_QUERY, DefenseRow, Pairing, RankStatus, Study, facts, studies
from kdbench.board.tables.reported import NOTE as PUBLISHED_NOTE
from kdbench.board.tables.reported import reported as reported_table
from kdbench.board.warnings import explained, warnings
from kdbench.records import Cell, Status

CHOSEN = "steal.chosen_"  # what an attack writes down of its own choices
BEST, NOT_BETTER = "▲", "°"

_STUDENT = Column("student", "Student", Kind.TEXT, "the student's network", shown=False)
_DEFENSE = Column("defense", "Defense", Kind.TEXT, "the defense's label in the benchmark")
_METHOD = Column("method", "Method", Kind.TEXT, "the registered method behind the label", shown=False)
_N = Column("n", "n", Kind.WHOLE, "seeds behind the number that ranks", drop_order=3)
_UTILITY_LOSS = Column(
    "utility_loss",
    "Utility loss (points)",
    Kind.DIFFERENCE,
    "victim accuracy as served by none minus as served by this defense",
)
_STOLEN = Column("student_acc", "Stolen accuracy (%)", Kind.SHARE, "test accuracy of the student")
_PROTECTION = Column(
    "protection", "Protection (points)", Kind.DIFFERENCE, "student accuracy on none minus here, paired by seed"
)
_GAINS = (
    Column(
        "gain",
        "Net gain (points)",
        Kind.DIFFERENCE,
        "student accuracy minus that of the best baseline without the victim on the same data",
        drop_order=2,
    ),
    Column(
        "gain_over_labels",
        "Gain over labels (points)",
        Kind.DIFFERENCE,
        "student accuracy minus the hard-label thief's on the same defense and data",
        drop_order=4,
    ),
    Column(
        "fidelity",
        "Agreement (%)",
        Kind.SHARE,
        "share of test images on which student and served victim agree",
        drop_order=5,
    ),
    Column("queries", "Queries", Kind.COUNT, "images that the oracle answered", drop_order=5),
)
_FRACTION = Column("fraction", "Share of the data", Kind.TEXT, "share of the training data that the thief uses")
_CELLS = Column("cells", "Cells", Kind.TEXT, "how the cells ended")

_RANKING = (
    _STUDENT,
    Column("rank", "Rank", Kind.WHOLE, "1 + the number of defenses whose protection interval lies wholly above"),
    _DEFENSE,
    _METHOD,
    Column("standing", "RankStatus", Kind.TEXT, "ranked, unranked, or lossy: outside the tolerance", shown=False),
    Column("strongest_attack", "Best response", Kind.TEXT, "the attack with the highest mean validation accuracy", 1),
    Column("parameters", "Its parameters", Kind.TEXT, "what the winning attack was played with, or chose by seed", 6),
    _STOLEN,
    _PROTECTION,
    _UTILITY_LOSS,
    *_GAINS,
    _N,
    Column("flags", "Flags", Kind.TEXT, "automatic warnings, explained below", 2),
    Column("marks", "Marks", Kind.TEXT, "unexamined (no adaptive attack was scored), and cells without a score"),
)
_ATTACKS = (
    _STUDENT,
    _DEFENSE,
    Column("attack", "Attack", Kind.TEXT, "the attack's label in the benchmark"),
    _FRACTION,
    Column("adaptive", "Adaptive", Kind.TEXT, "whether the attack was made to undo defenses"),
    Column("chosen", "Best response", Kind.TEXT, "whether the thief would choose this attack"),
    _CELLS,
    _STOLEN,
    _PROTECTION,
    *_GAINS,
    Column("bypassed_acc", "Bypassed (%)", Kind.SHARE, "student accuracy where the defense was not in the path"),
)
_BASELINES = (
    _STUDENT,
    Column("baseline", "Baseline", Kind.TEXT, "how the thief trains alone"),
    _FRACTION,
    Column("part", "Part", Kind.TEXT, "the seed that the share was drawn with"),
    Column("student_acc", "Accuracy (%)", Kind.SHARE, "test accuracy of the student"),
    Column("student_val_acc", "Validation accuracy (%)", Kind.SHARE, "validation accuracy of the student"),
    Column("chosen", "Chosen", Kind.TEXT, "whether net gains on this part of the data are measured against it"),
    _CELLS,
)
_MISSING = (
    _STUDENT,
    Column("status", "Status", Kind.TEXT, "skipped, failed or bypassed"),
    Column("attack", "Attack", Kind.TEXT, "the attack's label in the benchmark"),
    Column("reason", "Reason", Kind.TEXT, "why"),
    Column("defenses", "Defenses", Kind.TEXT, "against which defenses"),
    Column("seeds", "Seeds", Kind.TEXT, "with which seeds"),
)


def accuracy_board(cells: Iterable[Cell]) -> Board:
    """Who keeps what from thieves: defenses ranked by their protection under the best response, a section a student.

    Raises `KdbenchError` when there are no cells, or cells of several benchmarks.
    """
    all_cells = list(cells)
    found = studies(all_cells)
    tables = [table for student in found for table in _student_tables(student)]
    about = facts(all_cells)
    return Board("leaderboard", f"Leaderboard: {about['suite']}", about, tables, _notes(found, about))


def _student_tables(found: Study) -> list[Table]:
    tables = [_ranking(found), _cross(found)]
    beside = reported_table(found)
    if beside.rows:
        tables.append(beside)
    if found.baselines:
        rows = [_baseline_row(found, pairing) for pairing in found.baselines]
        tables.append(Table("baselines", "Without the victim", found.student, _BASELINES, rows, {}))
    missing = _missing_rows(found)
    if missing:
        tables.append(Table("missing", "Cells without a score", found.student, _MISSING, missing, {}, folded=True))
    rows = [_attack_row(found, pairing) for defense in found.defenses for pairing in found.against(defense.name)]
    return [*tables, Table("attacks", "Every attack", found.student, _ATTACKS, rows, {}, folded=True)]


def _ranking(found: Study) -> Table:
    rows = found.rows()
    texts = {
        RankStatus.UNRANKED: "not ranked: nothing to rank by",
        RankStatus.LOSSY: f"below the line: loss above {100 * found.tolerance:g} points",
    }
    first = {standing: index for index, standing in reversed(list(enumerate(row.standing for row in rows)))}
    breaks = {first[standing]: text for standing, text in texts.items() if standing in first}
    return Table("ranking", "Ranking", found.student, _RANKING, [_entry_row(found, row) for row in rows], breaks)


def _entry_row(found: Study, row: DefenseRow) -> Row:
    scores = _scores(found, row.best) if row.best else {}
    n = row.protection or (row.best.mean("student_acc") if row.best else None)
    return scores | {
        "student": found.student,
        "rank": row.rank,
        "defense": row.defense.name,
        "method": row.defense.method,
        "standing": row.standing.value,
        "strongest_attack": row.best.attack.name if row.best else None,
        "parameters": _parameters(row.best) if row.best else None,
        "protection": row.protection,
        "utility_loss": row.utility_loss,
        "n": n.n if n else None,
        "flags": "; ".join(warnings(found, row.defense, row.best)),
        "marks": "; ".join(row.marks),
    }


def _parameters(pairing: Pairing) -> str:
    """The fields of an attack; those that it chose for itself as it chose them with each seed."""
    choices: dict[str, list[str]] = defaultdict(list)
    for cell in pairing.cells:
        for name, value in cell.metrics.items():
            if name.startswith(CHOSEN):
                choices[name.removeprefix(CHOSEN)].append(f"{value:g}")
    chosen = [f"{name} {', '.join(values)} (chosen by seed)" for name, values in choices.items()]
    grids = {f"{name}s" for name in choices}
    fields = {name: value for name, value in pairing.attack.fields.items() if name not in grids}
    return "; ".join([*chosen, *(f"{name} {_plain(value)}" for name, value in fields.items())])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _scores(found: Study, pairing: Pairing) -> dict[str, Any]:
    return {
        "student_acc": pairing.mean("student_acc"),
        "protection": found.protection(pairing),
        "gain": found.gain(pairing),
        "gain_over_labels": found.gain_over_labels(pairing),
        "fidelity": pairing.mean("fidelity"),
        "queries": pairing.mean("queries"),
    }


def _attack_row(found: Study, pairing: Pairing) -> Row:
    assert pairing.defense is not None
    return _scores(found, pairing) | {
        "student": found.student,
        "defense": pairing.defense.name,
        "attack": pairing.attack.name,
        "fraction": pairing.part[0],
        "adaptive": pairing.adaptive,
        "chosen": pairing is found.strongest_attack(pairing.defense.name),
        "cells": _endings(pairing),
        "bypassed_acc": pairing.mean("student_acc", Status.BYPASSED),
    }


def _baseline_row(found: Study, pairing: Pairing) -> Row:
    fraction, part = pairing.part
    return {
        "student": found.student,
        "baseline": pairing.attack.name,
        "fraction": fraction,
        "part": part,
        "student_acc": pairing.mean("student_acc"),
        "student_val_acc": pairing.mean("student_val_acc"),
        "chosen": pairing is found.baseline(pairing.part),
        "cells": _endings(pairing),
    }


def _endings(pairing: Pairing) -> str:
    counts = {status: pairing.count(status) for status in Status}
    return ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)


def _cross(found: Study) -> Table:
    """Defense against attack, and what the thief reaches alone on the data that each attack uses."""
    attacks = [Column(f"attack {a.name}", a.name, Kind.TEXT, "stolen accuracy (%)") for a in found.attacks]
    rows: list[Row] = []
    for defense in found.defenses:
        response, pairings = found.strongest_attack(defense.name), found.against(defense.name)
        scores = {f"attack {m.attack.name}": _cross_text(found, m, m is response) for m in pairings}
        rows.append({"defense": defense.name, **scores})
    alone = {f"attack {a.name}": text(found.baseline_of_attack(a.name), Kind.SHARE) for a in found.attacks}
    rows.append({"defense": NO_QUERY, **alone})
    title = "Stolen accuracy (%), defense against attack"
    return Table("cross", title, found.student, [_DEFENSE, *attacks], rows, {}, human_only=True)


def _cross_text(found: Study, pairing: Pairing, is_best: bool) -> str:
    score, gain = pairing.mean("student_acc"), found.gain(pairing)
    marks = [BEST] * is_best + [NOT_BETTER] * bool(gain and gain.mean <= 0)
    parts = [" ".join([text(score, Kind.SHARE), *marks])] if score else []
    for status in (Status.FAILED, Status.SKIPPED, Status.BYPASSED):
        if count := pairing.count(status):
            parts.append(f"{count} {status.value}" if score else status.value)
    past = pairing.mean("student_acc", Status.BYPASSED)
    return ", ".join(parts) + (f" ({text(past, Kind.SHARE)})" if past else "")


def _missing_rows(found: Study) -> list[Row]:
    """Cells that were not scored, those with the same reason in one row."""
    groups: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for pairing in [*found.pairings.values(), *found.baselines]:
        for cell in pairing.cells:
            if cell.status is not Status.DONE:
                groups[cell.status.value, cell.attack.name, cell.reason].append(cell)
    return [_missing_row(found, *key, groups[key]) for key in sorted(groups)]


def _missing_row(found: Study, status: str, attack: str, reason: str, cells: Sequence[Cell]) -> Row:
    defenses = sorted({cell.defense.name if cell.defense else NO_QUERY for cell in cells})
    seeds = ", ".join(str(seed) for seed in sorted({cell.seed for cell in cells}))
    names = {"student": found.student, "status": status, "attack": attack, "reason": reason}
    return names | {"defenses": ", ".join(defenses), "seeds": seeds}


def _notes(found: Sequence[Study], about: dict[str, Any]) -> list[str]:
    marks = {mark.partition(":")[0] for student in found for row in student.rows() for mark in row.marks}
    tolerance = f"Only defenses whose mean utility loss is at most {100 * about['tolerance']:g} points are ranked."
    notes = [interval_note(len(about["seeds"])), f"{_RANK_NOTE} {tolerance}", _RESPONSE_NOTE, _GAIN_NOTE, _SIGNS_NOTE]
    if any(student.reference is None for student in found):
        notes.append(_NO_REFERENCE_NOTE)
    if not any(student.baselines for student in found):
        notes.append(_NO_BASELINE_NOTE)
    if "bypassed" in marks:
        notes.append(_BYPASSED_NOTE)
    if "unexamined" in marks:
        notes.append(_UNEXAMINED_NOTE)
    notes += explained(found)
    if any(reported_table(student).rows for student in found):
        notes.append(PUBLISHED_NOTE)
    return notes


_RANK_NOTE = (
    "Rank: 1 + the number of defenses whose protection interval lies wholly above; overlapping intervals share a rank."
)
_RESPONSE_NOTE = (
    "Best response: the attack with the highest mean validation accuracy, reported by its test accuracy. Protection is "
    "what the best response takes from none, by the attacks that are scored on both sides, minus what it takes here."
)
_GAIN_NOTE = (
    "Net gain: over the best baseline without the victim on the same part of the data (chosen on validation data; "
    "without data: over guessing). A theft without net gain stole nothing."
)
_SIGNS_NOTE = (
    f"{BEST} best response; {NOT_BETTER} not above '{NO_QUERY}', the best baseline on the data that the attack uses."
)
_BYPASSED_NOTE = (
    "Bypassed: the defense was not in this attack's path. Its accuracy is listed, but not scored as if the defense had "
    "been tried: against this thief the defense does nothing."
)
_UNEXAMINED_NOTE = (
    "Unexamined: no adaptive attack was scored against this defense, so that its protection may be an illusion."
)
_NO_REFERENCE_NOTE = (
    "No defense of the method 'none' was played: protection and utility loss are unknown, and nobody has a rank."
)
_NO_BASELINE_NOTE = "No baseline was trained without the victim: net gain is unknown, but for thieves without data."
