"""One attack against one defense, one defended victim, and what was measured of them by seed."""

from collections.abc import Iterable
from dataclasses import dataclass

from kdbench.board.intervals import BySeed, Estimate, estimate
from kdbench.board.remember import remembered
from kdbench.records import AttackRecord, Cell, DefenseRecord, Status, SubsetRecord


@dataclass(frozen=True, eq=False)
class Pairing:
    """One attack against one defense by one student; its cells in the order of their seeds. defense None: a baseline."""

    defense: DefenseRecord | None
    attack: AttackRecord
    cells: tuple[Cell, ...]

    @property
    def subset(self) -> SubsetRecord:
        """The part of the attacker's images that the attack uses."""
        return self.cells[0].subset

    def count(self, status: Status) -> int:
        """How many of its cells ended so."""
        return sum(cell.status is status for cell in self.cells)

    @remembered
    def by_seed(self, metric: str, status: Status = Status.DONE) -> BySeed:
        """A metric of the cells that ended with `status`; seeds without it are left out."""
        return {c.seed: c.metrics[metric] for c in self.cells if c.status is status and metric in c.metrics}

    @remembered
    def mean(self, metric: str, status: Status = Status.DONE) -> Estimate | None:
        """A metric over seeds; None where it was not measured."""
        return estimate(self.by_seed(metric, status))


@dataclass(frozen=True, eq=False)
class ServedVictim:
    """The victim behind one defense: what was measured of it, which every cell of the same seed repeats."""

    defense: DefenseRecord
    cells: tuple[Cell, ...]

    @remembered
    def by_seed(self, metric: str) -> BySeed:
        """A metric of the cells that have it, scored or bypassed."""
        return {cell.seed: cell.metrics[metric] for cell in self.cells if metric in cell.metrics}

    @remembered
    def mean(self, metric: str) -> Estimate | None:
        """A metric over seeds; None where it was not measured."""
        return estimate(self.by_seed(metric))


def strongest(pairings: Iterable[Pairing]) -> Pairing | None:
    """The pairing with the highest mean validation accuracy, never chosen on test data; ties go to the first."""
    scored = [(pairing, pairing.mean("student_val_acc")) for pairing in pairings]
    known = [(pairing, score.mean) for pairing, score in scored if score]
    return max(known, key=lambda pair: pair[1])[0] if known else None
