"""Ours beside theirs: a table of the figures that papers give for what was played."""

from dataclasses import replace

from kdbench.board.document import Column, Kind, Row, Table
from kdbench.board.intervals import Estimate, estimate
from kdbench.board.study import NO_QUERY, Pairing, Study, victim_by_seed

UNVERIFIED = "unverified"
OF_VICTIM = "victim_acc"
NOTE = (
    "Published figures were mostly chosen by best test epoch with one seed; ours are of the last epoch. "
    f"'{UNVERIFIED}': the figure was not found in a source that could be read."
)

_COLUMNS = (
    Column("student", "Student", Kind.TEXT, "the student's network", shown=False),
    Column("defense", "Defense", Kind.TEXT, "the defense's label in the benchmark"),
    Column("attack", "Attack", Kind.TEXT, "the attack's label in the benchmark, or the victim itself"),
    Column("ours", "Ours (%)", Kind.SHARE, "test accuracy in this run"),
    Column("theirs", "Published (%)", Kind.SHARE, "the accuracy that the source gives"),
    Column("difference", "Difference (points)", Kind.DIFFERENCE, "ours minus theirs"),
    Column("evidence", "Evidence", Kind.TEXT, "how the published figure is known"),
    Column("source", "Source", Kind.TEXT, "where it stands"),
)


def reported(found: Study) -> Table:
    """Each published figure once; no rows where papers say nothing."""
    rows: dict[tuple[str, str, str, float], Row] = {}
    for pairing in [*found.pairings.values(), *found.baselines]:
        for said in pairing.cells[0].reported:
            about = pairing.defense.name if pairing.defense else NO_QUERY
            attack = "the victim" if said.metric == OF_VICTIM else pairing.attack.name
            ours = _ours(found, pairing, said.metric)
            rows[about, attack, said.source, said.value] = {
                "student": found.student,
                "defense": about,
                "attack": attack,
                "ours": ours,
                "theirs": Estimate(said.value, None, 1),
                "difference": replace(ours, mean=ours.mean - said.value) if ours else None,
                "evidence": UNVERIFIED if said.evidence == "memory" else said.evidence,
                "source": said.source,
            }
    return Table("reported", "Beside published figures", found.student, _COLUMNS, list(rows.values()), {})


def _ours(found: Study, pairing: Pairing, metric: str) -> Estimate | None:
    """A victim is known from every attack that was played against it, even where this one was not."""
    if metric != OF_VICTIM:
        return pairing.mean(metric)
    own = found.against(pairing.defense.name) if pairing.defense else [pairing]
    return estimate(victim_by_seed([cell for each in own for cell in each.cells], metric))
