"""From cells to scores: who stole how much from whom, against which baseline, and what the best response is."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from kdbench.board.intervals import BySeed, Estimate, estimate, paired, ranks
from kdbench.errors import KdbenchError
from kdbench.records import Cell, MethodRecord, Status

REFERENCE = "none"  # the method that protections and losses are measured against
LABELS_ONLY = "hard-label"  # the method that sees top-1 answers only

NO_QUERY = "no victim"  # how people read the absence of a defense

Part = tuple[float, int]
"""The part of the training data that a thief used: (fraction, seed)."""

_SHARED: Mapping[str, Callable[[Cell], object]] = {
    "suite": lambda cell: cell.suite,
    "dataset": lambda cell: cell.dataset,
    "dataset_digest": lambda cell: cell.dataset_digest,
    "victim": lambda cell: cell.victim,
    "tolerance": lambda cell: cell.tolerance,
}


class RankStatus(StrEnum):
    """Where a defense stands on a board."""

    RANKED = "ranked"
    LOSSY = "lossy"
    UNRANKED = "unranked"


@dataclass(frozen=True)
class Pairing:
    """One attack against one defense (None: a baseline) by one student; its cells in the order of their seeds."""

    defense: MethodRecord | None
    attack: MethodRecord
    cells: tuple[Cell, ...]

    @property
    def adaptive(self) -> bool:
        """Whether the attack was made to undo defenses."""
        return self.cells[0].adaptive

    @property
    def part(self) -> Part:
        """The part of the training data that the thief used."""
        return _part(self.cells[0])

    def count(self, status: Status) -> int:
        """How many of its cells ended so."""
        return sum(cell.status is status for cell in self.cells)

    def by_seed(self, metric: str, status: Status = Status.DONE) -> dict[int, float]:
        """A metric of the cells that ended with `status`; seeds without it are left out."""
        return {c.seed: c.metrics[metric] for c in self.cells if c.status is status and metric in c.metrics}

    def mean(self, metric: str, status: Status = Status.DONE) -> Estimate | None:
        """A metric over seeds; None where it was not measured."""
        return estimate(self.by_seed(metric, status))


@dataclass(frozen=True)
class DefenseRow:
    """A defense on the accuracy board, under the best response to it: `best`."""

    defense: MethodRecord
    standing: RankStatus
    rank: int | None
    best: Pairing | None
    protection: Estimate | None
    utility_loss: Estimate | None
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """All matches of one student, and what they come to."""

    student: str
    classes: int
    tolerance: float
    pairings: Mapping[tuple[str, str], Pairing]
    baselines: Sequence[Pairing]

    @property
    def defenses(self) -> list[MethodRecord]:
        """The defenses that were played, the reference first, then by label."""
        found = {label: pairing.defense for (label, _), pairing in self.pairings.items() if pairing.defense}
        return sorted(found.values(), key=lambda d: (d.method != REFERENCE, d.name))

    @property
    def attacks(self) -> list[MethodRecord]:
        """The attacks that were played, by label."""
        found = {label: pairing.attack for (_, label), pairing in self.pairings.items()}
        return [found[label] for label in sorted(found)]

    @property
    def reference(self) -> str | None:
        """The label of the defense that does nothing, if it was played."""
        return next((d.name for d in self.defenses if d.method == REFERENCE), None)

    def against(self, defense: str) -> list[Pairing]:
        """The matches of all attacks against `defense`, by the attacks' labels."""
        return [self.pairings[key] for key in sorted(self.pairings) if key[0] == defense]

    def protection(self, pairing: Pairing) -> Estimate | None:
        """Student accuracy of the same attack on the reference, minus the student accuracy of `pairing`."""
        return estimate(paired(self._on_reference(pairing.attack.name), pairing.by_seed("student_acc")))

    def gain(self, pairing: Pairing) -> Estimate | None:
        """Student accuracy minus what the thief reaches without the victim on the same part of the data."""
        return estimate(paired(pairing.by_seed("student_acc"), self.baseline_acc(pairing)))

    def gain_over_labels(self, pairing: Pairing) -> Estimate | None:
        """Student accuracy minus that of the thief who saw top-1 answers only of the same defense, on the same part."""
        if pairing.defense is None or pairing.attack.method == LABELS_ONLY:
            return None
        others = self.against(pairing.defense.name)
        labels_only = best([m for m in others if m.attack.method == LABELS_ONLY and m.part == pairing.part])
        return (
            estimate(paired(pairing.by_seed("student_acc"), labels_only.by_seed("student_acc")))
            if labels_only
            else None
        )

    def baseline_acc(self, pairing: Pairing) -> dict[int, float]:
        """By seed, the test accuracy of the best baseline on the data of `pairing`; without data, of guessing."""
        if pairing.part[0] == 0:
            return {cell.seed: 1 / self.classes for cell in pairing.cells}
        baseline = self.baseline(pairing.part)
        return baseline.by_seed("student_acc") if baseline else {}

    def baseline_of_attack(self, attack: str) -> Estimate | None:
        """What the thief reaches without the victim on the data that `attack` uses."""
        pairing = next((pairing for (_, label), pairing in self.pairings.items() if label == attack), None)
        return estimate(self.baseline_acc(pairing)) if pairing else None

    def baseline(self, part: Part) -> Pairing | None:
        """The best baseline on that part of the data, chosen on validation data."""
        return best([pairing for pairing in self.baselines if pairing.part == part])

    def utility_loss(self, defense: str) -> Estimate | None:
        """Accuracy of the victim as served by the reference, minus as served by `defense`."""
        return estimate(paired(self._victim_acc(self.reference), self._victim_acc(defense)))

    def strongest_attack(self, defense: str) -> Pairing | None:
        """The attack that the thief would choose against `defense`."""
        return best(self.against(defense))

    def protection_under_strongest(self, defense: str) -> Estimate | None:
        """Student accuracy of the best response to the reference, minus that of the best response to `defense`.

        On the reference the thief chooses among the attacks that are scored against `defense` too: an attack that was
        skipped, failed or went past the defense must not count in its favour.
        """
        response = self.strongest_attack(defense)
        menu = {pairing.attack.name for pairing in self.against(defense) if pairing.by_seed("student_acc")}
        on_reference = best([m for m in self.against(self.reference or "") if m.attack.name in menu])
        if response is None or on_reference is None:
            return None
        return estimate(paired(on_reference.by_seed("student_acc"), response.by_seed("student_acc")))

    def rows(self) -> list[DefenseRow]:
        """The board: ranked defenses, then those without a rank, then those outside the tolerance by their loss."""
        scored = [self._row(defense) for defense in self.defenses]
        ranked = _ranked([entry for entry in scored if entry.standing is not RankStatus.LOSSY])
        return ranked + sorted((e for e in scored if e.standing is RankStatus.LOSSY), key=_by_loss)

    def _row(self, defense: MethodRecord) -> DefenseRow:
        label, loss = defense.name, self.utility_loss(defense.name)
        standing = RankStatus.LOSSY if loss and loss.mean > self.tolerance else RankStatus.UNRANKED
        protection = self.protection_under_strongest(label)
        return DefenseRow(defense, standing, None, self.strongest_attack(label), protection, loss, self._marks(defense))

    def _marks(self, defense: MethodRecord) -> tuple[str, ...]:
        pairings = self.against(defense.name)
        marks = []
        if defense.method != REFERENCE and not any(m.adaptive and m.count(Status.DONE) for m in pairings):
            marks.append("unexamined")
        bypassed = [m.attack.name for m in pairings if m.count(Status.BYPASSED)]
        if bypassed:
            marks.append(f"bypassed: {', '.join(bypassed)}")
        counts = {status: sum(m.count(status) for m in pairings) for status in (Status.SKIPPED, Status.FAILED)}
        return (*marks, *(f"{status}: {count}" for status, count in counts.items() if count))

    def _on_reference(self, attack: str) -> BySeed:
        pairing = self.pairings.get((self.reference or "", attack))
        return pairing.by_seed("student_acc") if pairing else {}

    def _victim_acc(self, defense: str | None) -> BySeed:
        return victim_by_seed([c for m in self.against(defense or "") for c in m.cells], "victim_acc")


def studies(cells: Iterable[Cell]) -> list[Study]:
    """The standings of each student, by name. Raises `KdbenchError` when the cells are not of one benchmark."""
    ordered = sorted(cells, key=lambda c: (c.student, c.name, c.seed))
    _check_one_benchmark(ordered)
    by_student: dict[str, list[Cell]] = defaultdict(list)
    for cell in ordered:
        by_student[cell.student].append(cell)
    return [_study(student, own) for student, own in by_student.items()]


def facts(cells: Iterable[Cell]) -> dict[str, Any]:
    """What the cells of one benchmark share, its students and its seeds."""
    all_cells = list(cells)
    first = all_cells[0]
    return {
        "suite": first.suite,
        "dataset": first.dataset,
        "dataset_digest": first.dataset_digest,
        "classes": first.classes,
        "victim": first.victim,
        "students": sorted({cell.student for cell in all_cells}),
        "seeds": sorted({cell.seed for cell in all_cells}),
        "tolerance": first.tolerance,
    }


def victim_by_seed(cells: Iterable[Cell], metric: str) -> dict[int, float]:
    """A metric of one defense's victim, which every cell of the same seed repeats."""
    return {c.seed: c.metrics[metric] for c in cells if metric in c.metrics}


def best(pairings: Iterable[Pairing]) -> Pairing | None:
    """The match with the highest mean validation accuracy, never chosen on test data; ties go to the first."""
    scored = [(pairing, pairing.mean("student_val_acc")) for pairing in pairings]
    known = [(pairing, score.mean) for pairing, score in scored if score]
    return max(known, key=lambda pair: pair[1])[0] if known else None


def _study(student: str, cells: Sequence[Cell]) -> Study:
    groups: dict[tuple[str | None, Part | None, str], list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda c: c.seed):
        defense, part = (cell.defense.name, None) if cell.defense else (None, _part(cell))
        groups[defense, part, cell.attack.name].append(cell)
    pairings, baselines = {}, []
    for defense, part, attack in sorted(groups, key=lambda k: (k[0] or "", k[1] or (0, 0), k[2])):
        own = groups[defense, part, attack]
        pairing = Pairing(own[0].defense, own[0].attack, tuple(own))
        if defense is None:
            baselines.append(pairing)
        else:
            pairings[defense, attack] = pairing
    return Study(student, cells[0].classes, cells[0].tolerance, pairings, baselines)


def _part(cell: Cell) -> Part:
    return float(cell.subset["fraction"]), int(cell.subset["seed"])


def _ranked(rows: Sequence[DefenseRow]) -> list[DefenseRow]:
    found = ranks([entry.protection if entry.utility_loss else None for entry in rows])
    placed = [
        replace(entry, rank=rank, standing=RankStatus.RANKED if rank else RankStatus.UNRANKED)
        for entry, rank in zip(rows, found, strict=True)
    ]
    return sorted(placed, key=_by_rank)


def _by_rank(entry: DefenseRow) -> tuple[float, float, str]:
    protection = entry.protection.mean if entry.protection else float("-inf")
    return (entry.rank or float("inf"), -protection, entry.defense.name)


def _by_loss(entry: DefenseRow) -> tuple[float, str]:
    return (entry.utility_loss.mean if entry.utility_loss else float("inf"), entry.defense.name)


def _check_one_benchmark(cells: Sequence[Cell]) -> None:
    if not cells:
        raise KdbenchError("There is no cell to make a leaderboard of.")
    for name, of in _SHARED.items():
        values = sorted({str(of(cell)) for cell in cells})
        if len(values) > 1:
            raise KdbenchError(
                f"The results are not of one benchmark: {name} is {' and '.join(values)}. Give each its own folder."
            )
    _check_labels("defense", [cell.defense for cell in cells if cell.defense])
    _check_labels("attack", [cell.attack for cell in cells])


def _check_labels(kind: str, players: Iterable[MethodRecord]) -> None:
    settings: dict[str, str] = {}
    for player in players:
        text = f"{player.method} {json.dumps(player.fields, sort_keys=True)}"
        if settings.setdefault(player.name, text) != text:
            several = f"{settings[player.name]} and {text}"
            raise KdbenchError(f"The {kind} '{player.name}' is several things: {several}. Give each its own label.")
