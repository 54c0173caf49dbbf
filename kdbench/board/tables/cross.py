"""A table of student accuracy for reading: defense against attack, and what an attacker reaches without queries."""

from kdbench.board.document import Column, Kind, Table, filled, text
from kdbench.board.pairing import Pairing
from kdbench.board.study import NO_QUERY, Study
from kdbench.board.tables import columns
from kdbench.records import Status

BEST, NOT_ABOVE = "▲", "°"


def cross(study: Study, section: str) -> Table:
    """A row for each defense and one without a defense; a column for each attack."""
    rows: list[str | None] = [*(defense.name for defense in study.defenses), None]
    shown = [columns.defense(_row_name), *(_column(study, attack.name) for attack in study.attacks)]
    title = "Student accuracy (%), defense against attack"
    return Table("cross", title, section, shown, filled(shown, rows), human_only=True)


def _row_name(defense: str | None) -> str:
    return defense or NO_QUERY


def _column(study: Study, attack: str) -> Column[str | None]:
    def cell(defense: str | None) -> str | None:
        if defense is None:
            return text(study.baseline_of_attack(attack), Kind.SHARE)
        pairing = study.pairings.get((defense, attack))
        return _text(study, pairing) if pairing else None

    return Column(f"attack {attack}", attack, Kind.TEXT, "student accuracy (%)", cell)


def _text(study: Study, pairing: Pairing) -> str:
    """Accuracy with its signs, and how many cells have none; in parentheses that of attacks which bypass the defense."""
    assert pairing.defense is not None
    score, gain = pairing.mean("student_acc"), study.gain(pairing)
    is_best = pairing is study.strongest_attack(pairing.defense.name)
    signs = [BEST] * is_best + [NOT_ABOVE] * bool(gain and gain.mean <= 0)
    parts = [" ".join([text(score, Kind.SHARE), *signs])] if score else []
    for status in (Status.FAILED, Status.SKIPPED, Status.BYPASSED):
        if count := pairing.count(status):
            parts.append(f"{count} {status.value}" if score else status.value)
    bypassed = pairing.mean("student_acc", Status.BYPASSED)
    return ", ".join(parts) + (f" ({text(bypassed, Kind.SHARE)})" if bypassed else "")
