"""A table of the numbers that papers report for what was run, beside those of this run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kdbench.board.document import Column, Kind, Table, filled
from kdbench.board.intervals import Estimate
from kdbench.board.pairing import Pairing
from kdbench.board.study import NO_QUERY, Study
from kdbench.board.tables import columns
from kdbench.metrics import METRICS
from kdbench.records import ReportedNumber

UNVERIFIED = "unverified"
FROM_MEMORY = "memory"  # the evidence of a number that was not found in a source that could be read
OF_VICTIM = METRICS["victim_acc"].name
NOTE = (
    "Reported numbers were mostly chosen by best test epoch with one seed; ours are of the last epoch. "
    f"'{UNVERIFIED}': the number was not found in a source that could be read."
)


@dataclass(frozen=True)
class ReportedRow:
    """A number that a paper reports of a pairing, or of its victim."""

    study: Study
    pairing: Pairing
    number: ReportedNumber

    @property
    def defense(self) -> str:
        """The defense in words."""
        return self.pairing.defense.name if self.pairing.defense else NO_QUERY

    @property
    def attack(self) -> str:
        """The attack in words."""
        return "the victim" if self.number.metric == OF_VICTIM else self.pairing.attack.name

    @property
    def ours(self) -> Estimate | None:
        """What was measured here. A victim is known from every attack on it, even where this one was not scored."""
        if self.number.metric == OF_VICTIM and self.pairing.defense:
            return self.study.victims[self.pairing.defense.name].mean(OF_VICTIM)
        return self.pairing.mean(self.number.metric)

    @property
    def theirs(self) -> Estimate:
        """The reported number, without an interval."""
        return Estimate(self.number.value, None, 1)

    @property
    def difference(self) -> Estimate | None:
        """Ours minus theirs, with our interval."""
        return replace(self.ours, mean=self.ours.mean - self.number.value) if self.ours else None

    @property
    def evidence(self) -> str:
        """How the number is known."""
        return UNVERIFIED if self.number.evidence == FROM_MEMORY else self.number.evidence


_COLUMNS: Sequence[Column[ReportedRow]] = (
    columns.student(lambda row: row.study.student),
    columns.scenario(lambda row: row.study.scenario),
    columns.defense(lambda row: row.defense),
    columns.attack(lambda row: row.attack, "the attack's name in the suite, or the victim itself"),
    Column("ours", "Ours (%)", Kind.SHARE, "test accuracy in this run", lambda row: row.ours),
    Column("theirs", "Reported (%)", Kind.SHARE, "the accuracy that the source reports", lambda row: row.theirs),
    Column("difference", "Difference (points)", Kind.DIFFERENCE, "ours minus theirs", lambda row: row.difference),
    Column("evidence", "Evidence", Kind.TEXT, "how the reported number is known", lambda row: row.evidence),
    Column("source", "Source", Kind.TEXT, "where it is reported", lambda row: row.number.source),
)


def reported(study: Study, section: str) -> Table:
    """Each reported number once; no rows where papers report nothing."""
    rows = {(row.defense, row.attack, row.number.source, row.number.value): row for row in _rows(study)}
    return Table("reported", "Beside reported numbers", section, _COLUMNS, filled(_COLUMNS, rows.values()))


def _rows(study: Study) -> Iterator[ReportedRow]:
    for pairing in [*study.pairings.values(), *study.baselines]:
        for number in pairing.cells[0].reported:
            yield ReportedRow(study, pairing, number)
