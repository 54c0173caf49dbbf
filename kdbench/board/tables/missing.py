"""The cells of a study without a score."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kdbench.board.document import Column, Kind, Table, filled
from kdbench.board.study import NO_QUERY, Study
from kdbench.board.tables import columns
from kdbench.records import Cell, Status


@dataclass(frozen=True)
class MissingRow:
    """Cells of one attack that ended alike for the same reason."""

    study: Study
    status: Status
    attack: str
    reason: str
    cells: Sequence[Cell]

    @property
    def defenses(self) -> str:
        """Against which defenses, in words."""
        return ", ".join(sorted({cell.defense.name if cell.defense else NO_QUERY for cell in self.cells}))

    @property
    def seeds(self) -> str:
        """With which seeds, in words."""
        return ", ".join(str(seed) for seed in sorted({cell.seed for cell in self.cells}))


_COLUMNS: Sequence[Column[MissingRow]] = (
    columns.student(lambda row: row.study.student),
    columns.scenario(lambda row: row.study.scenario),
    Column("status", "Status", Kind.TEXT, "skipped, failed or bypassed", lambda row: row.status.value),
    columns.attack(lambda row: row.attack),
    Column("reason", "Reason", Kind.TEXT, "why", lambda row: row.reason),
    Column("defenses", "Defenses", Kind.TEXT, "against which defenses", lambda row: row.defenses),
    Column("seeds", "Seeds", Kind.TEXT, "with which seeds", lambda row: row.seeds),
)


def missing(study: Study, section: str) -> Table:
    """Cells that were not scored, those with the same reason in one row; no rows where all were scored."""
    groups: dict[tuple[Status, str, str], list[Cell]] = defaultdict(list)
    for cell in study.cells:
        if cell.status is not Status.DONE:
            groups[cell.status, cell.attack.name, cell.reason].append(cell)
    rows = [MissingRow(study, *key, groups[key]) for key in sorted(groups)]
    return Table("missing", "Cells without a score", section, _COLUMNS, filled(_COLUMNS, rows), folded=True)
