"""From the cells of one student under one scenario to scores: protection, utility loss, gain, the strongest attack, ranks."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from kdbench.board.comparisons import ranks
from kdbench.board.intervals import BySeed, Estimate, estimate, paired
from kdbench.board.pairing import Pairing, ServedVictim, strongest
from kdbench.board.remember import remembered
from kdbench.records import AttackRecord, Cell, DefenseRecord, Status, SubsetRecord

__all__ = ["NO_QUERY", "UNDEFENDED", "AttackRow", "DefenseRow", "Pairing", "RankStatus", "Study", "by_defense"]

NO_QUERY = "no-query baseline"  # how people read the absence of a defense
UNDEFENDED = "undefended"  # how people read the reference where it is no row


class RankStatus(StrEnum):
    """Where a defense stands on a board."""

    RANKED = "ranked"
    ABOVE_TOLERANCE = "above tolerance"
    UNRANKED = "unranked"


@dataclass(frozen=True, eq=False)
class Study:
    """All cells of one student under one scenario, by seed, and what they come to. Every number is computed once."""

    student: str
    scenario: str
    cells: tuple[Cell, ...]

    @property
    def classes(self) -> int:
        """The number of classes of the data set."""
        return self.cells[0].classes

    @property
    def tolerance(self) -> float:
        """The utility loss up to which a defense is ranked, as a fraction."""
        return self.cells[0].tolerance

    @cached_property
    def seeds(self) -> Sequence[int]:
        """The seeds of the cells, ascending."""
        return sorted({cell.seed for cell in self.cells})

    @cached_property
    def pairings(self) -> Mapping[tuple[str, str], Pairing]:
        """The pairings by the names of defense and attack, in their order."""
        groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if cell.defense:
                groups[cell.defense.name, cell.attack.name].append(cell)
        return {key: Pairing(own[0].defense, own[0].attack, tuple(own)) for key, own in sorted(groups.items())}

    @cached_property
    def baselines(self) -> Sequence[Pairing]:
        """The no-query baselines, by data subset and name."""
        groups: dict[tuple[float, int, str], list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if not cell.defense:
                groups[cell.subset.fraction, cell.subset.seed, cell.attack.name].append(cell)
        return [Pairing(None, own[0].attack, tuple(own)) for _, own in sorted(groups.items())]

    @cached_property
    def victims(self) -> Mapping[str, ServedVictim]:
        """The victims by the name of the defense, the reference first."""
        return by_defense(cell for pairing in self.pairings.values() for cell in pairing.cells)

    @cached_property
    def defenses(self) -> Sequence[DefenseRecord]:
        """The defenses that were attacked, the reference first, then by name."""
        return [victim.defense for victim in self.victims.values()]

    @cached_property
    def attacks(self) -> Sequence[AttackRecord]:
        """The attacks that were run, by name."""
        found = {pairing.attack.name: pairing.attack for pairing in self.pairings.values()}
        return [found[name] for name in sorted(found)]

    @cached_property
    def reference(self) -> str | None:
        """The name of the undefended victim, if it was attacked."""
        return next((defense.name for defense in self.defenses if defense.is_reference), None)

    def against(self, defense: str | None) -> Sequence[Pairing]:
        """The pairings of all attacks against `defense`, by the attacks' names; none for a defense that is not here."""
        return self._by_defense.get(defense or "", ())

    @remembered
    def protection(self, pairing: Pairing) -> Estimate | None:
        """Student accuracy of the same attack on the undefended victim, minus the student accuracy of `pairing`."""
        undefended = self.pairings.get((self.reference or "", pairing.attack.name))
        accuracies = undefended.by_seed("student_acc") if undefended else {}
        return estimate(paired(accuracies, pairing.by_seed("student_acc")))

    @remembered
    def gain(self, pairing: Pairing) -> Estimate | None:
        """Student accuracy minus the no-query baseline on the same data subset."""
        return estimate(paired(pairing.by_seed("student_acc"), self.baseline_acc(pairing)))

    @remembered
    def gain_over_labels(self, pairing: Pairing) -> Estimate | None:
        """Student accuracy minus that of an attack on the same defense and data subset that learns from labels only."""
        if pairing.defense is None or pairing.attack.labels_only:
            return None
        others = self.against(pairing.defense.name)
        labels_only = strongest(p for p in others if p.attack.labels_only and p.subset == pairing.subset)
        if labels_only is None:
            return None
        return estimate(paired(pairing.by_seed("student_acc"), labels_only.by_seed("student_acc")))

    def baseline_acc(self, pairing: Pairing) -> BySeed:
        """By seed, the test accuracy of the best baseline on the data of `pairing`; without data, of guessing."""
        if pairing.subset.fraction == 0:
            return {cell.seed: 1 / self.classes for cell in pairing.cells}
        baseline = self.baseline(pairing.subset)
        return baseline.by_seed("student_acc") if baseline else {}

    @remembered
    def baseline_of_attack(self, attack: str) -> Estimate | None:
        """What an attacker reaches without queries on the data that `attack` uses."""
        pairing = next((pairing for (_, name), pairing in self.pairings.items() if name == attack), None)
        return estimate(self.baseline_acc(pairing)) if pairing else None

    @remembered
    def baseline(self, subset: SubsetRecord) -> Pairing | None:
        """The best no-query baseline on that data subset, chosen on validation data."""
        return strongest(pairing for pairing in self.baselines if pairing.subset == subset)

    @remembered
    def utility_loss(self, defense: str) -> Estimate | None:
        """Test accuracy of the undefended victim's answers, minus that of the answers that `defense` serves."""
        reference, victim = (self.victims.get(name or "") for name in (self.reference, defense))
        if not reference or not victim:
            return None
        return estimate(paired(reference.by_seed("victim_acc"), victim.by_seed("victim_acc")))

    @remembered
    def strongest_attack(self, defense: str) -> Pairing | None:
        """The attack that an attacker would choose against `defense`."""
        return strongest(self.against(defense))

    @remembered
    def protection_under_strongest(self, defense: str) -> Estimate | None:
        """Student accuracy under the strongest attack on the undefended victim, minus that under the strongest on `defense`.

        On the undefended victim only attacks that are scored against `defense` too are considered: an attack that was
        skipped, failed or bypassed the defense must not count in the defense's favour.
        """
        here = self.strongest_attack(defense)
        scored = {pairing.attack.name for pairing in self.against(defense) if pairing.by_seed("student_acc")}
        undefended = strongest(p for p in self.against(self.reference) if p.attack.name in scored)
        if here is None or undefended is None:
            return None
        return estimate(paired(undefended.by_seed("student_acc"), here.by_seed("student_acc")))

    @cached_property
    def rows(self) -> "Sequence[DefenseRow]":
        """The board: ranked defenses, then those without a rank, then those above the tolerance by their loss."""
        costly = {d.name for d in self.defenses if _above(self.utility_loss(d.name), self.tolerance)}
        rest = [defense for defense in self.defenses if defense.name not in costly]
        found = ranks([self._rankable(defense.name) for defense in rest])
        ranked = [
            DefenseRow(self, defense, RankStatus.RANKED if rank else RankStatus.UNRANKED, rank)
            for defense, rank in zip(rest, found, strict=True)
        ]
        below = [DefenseRow(self, d, RankStatus.ABOVE_TOLERANCE, None) for d in self.defenses if d.name in costly]
        return sorted(ranked, key=_by_rank) + sorted(below, key=_by_loss)

    def _rankable(self, defense: str) -> Estimate | None:
        """The protection, where the utility loss is known too: without it nobody knows whether it is within the tolerance."""
        return self.protection_under_strongest(defense) if self.utility_loss(defense) else None

    @cached_property
    def attack_rows(self) -> "Sequence[AttackRow]":
        """Every pairing, by defense and attack, the reference first."""
        return [AttackRow(self, pairing) for defense in self.defenses for pairing in self.against(defense.name)]

    @cached_property
    def _by_defense(self) -> Mapping[str, Sequence[Pairing]]:
        found: dict[str, list[Pairing]] = defaultdict(list)
        for (defense, _), pairing in self.pairings.items():
            found[defense].append(pairing)
        return found


@dataclass(frozen=True, eq=False)
class DefenseRow:
    """A defense on the board of a study, under the strongest attack on it."""

    study: Study
    defense: DefenseRecord
    status: RankStatus
    rank: int | None

    @property
    def strongest(self) -> Pairing | None:
        """The strongest attack on it, if any was scored."""
        return self.study.strongest_attack(self.defense.name)

    @property
    def protection(self) -> Estimate | None:
        """Under the strongest attack; a fraction."""
        return self.study.protection_under_strongest(self.defense.name)

    @property
    def utility_loss(self) -> Estimate | None:
        """A fraction of the test images."""
        return self.study.utility_loss(self.defense.name)

    @property
    def victim(self) -> ServedVictim:
        """The victim that it defends."""
        return self.study.victims[self.defense.name]

    @property
    def seeds(self) -> int | None:
        """How many seeds are behind the number that ranks."""
        of_strongest = self.strongest.mean("student_acc") if self.strongest else None
        number = self.protection or of_strongest
        return number.n if number else None

    def count(self, status: Status) -> int:
        """How many cells against it ended so."""
        return sum(pairing.count(status) for pairing in self.study.against(self.defense.name))


@dataclass(frozen=True, eq=False)
class AttackRow:
    """A pairing on the board of a study."""

    study: Study
    pairing: Pairing

    @property
    def is_strongest(self) -> bool:
        """Whether it is the strongest attack on its defense; of a baseline: whether it is the best on its data subset."""
        if self.pairing.defense is None:
            return self.pairing is self.study.baseline(self.pairing.subset)
        return self.pairing is self.study.strongest_attack(self.pairing.defense.name)


def by_defense(cells: Iterable[Cell]) -> Mapping[str, ServedVictim]:
    """The victims of these cells by the name of the defense, the reference first; baselines are left out."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    records: dict[str, DefenseRecord] = {}
    for cell in cells:
        if cell.defense:
            groups[cell.defense.name].append(cell)
            records[cell.defense.name] = cell.defense
    ordered = sorted(records.values(), key=lambda defense: (not defense.is_reference, defense.name))
    return {defense.name: ServedVictim(defense, tuple(groups[defense.name])) for defense in ordered}


def _above(loss: Estimate | None, tolerance: float) -> bool:
    return loss is not None and loss.mean > tolerance


def _by_rank(row: DefenseRow) -> tuple[float, float, str]:
    protection = row.protection.mean if row.protection else float("-inf")
    return (row.rank or float("inf"), -protection, row.defense.name)


def _by_loss(row: DefenseRow) -> tuple[float, str]:
    return (row.utility_loss.mean if row.utility_loss else float("inf"), row.defense.name)
