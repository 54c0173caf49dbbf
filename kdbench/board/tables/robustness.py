"""The robustness board: which victims withstand adversarial examples, and what students give away."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kdbench.board.comparisons import ranks
from kdbench.board.document import MAIN, Board, Column, Kind, Table, filled, interval_note
from kdbench.board.intervals import BySeed, Estimate, estimate, paired
from kdbench.board.pairing import Pairing, ServedVictim
from kdbench.board.studies import Studies
from kdbench.board.study import NO_QUERY, AttackRow, Study
from kdbench.board.tables import columns
from kdbench.metrics import ADVERSARIAL_ATTACKS, METRICS
from kdbench.records import Cell

VICTIM, STUDENT, TRANSFER = "victim", "student", "transfer"


def robustness_board(studies: Studies) -> Board:
    """Victims ranked by their worst adversarial accuracy against the undefended one's; a section for each study's students.

    Its tables have no rows when no cell was evaluated for adversarial robustness.
    """
    tables = [_victims(studies), *(_students(study, studies.title(study)) for study in studies.all)]
    notes = [interval_note(len(studies.facts.seeds)), *_NOTES, _implementation(studies.cells)]
    return Board("robustness", f"Robustness: {studies.facts.suite}", studies.facts, tables, notes)


def robust_metrics(cells: Iterable[Cell], side: str) -> Mapping[str, str]:
    """The adversarial accuracies that some cell has of `side`: the metric's name and the attack's title, weakest first."""
    names = {f"{side}_robust_{name}": title for name, title in ADVERSARIAL_ATTACKS.items()}
    return {name: names[name] for name in columns.measured(cells, names)}


@dataclass(frozen=True, eq=False)
class VictimRow:
    """A victim on the robustness board; all students attacked the same one."""

    victim: ServedVictim
    undefended: ServedVictim | None

    @cached_property
    def worst(self) -> BySeed:
        """By seed, the lowest of its adversarial accuracies."""
        return _worst(self.victim)

    @cached_property
    def gain(self) -> Estimate | None:
        """The worst adversarial accuracy, minus that of the undefended victim."""
        return estimate(paired(self.worst, _worst(self.undefended))) if self.undefended else None

    @property
    def utility_loss(self) -> Estimate | None:
        """Test accuracy of the undefended victim's answers, minus that of the answers served here."""
        if self.undefended is None:
            return None
        return estimate(paired(self.undefended.by_seed("victim_acc"), self.victim.by_seed("victim_acc")))


@dataclass(frozen=True)
class _Ranked:
    row: VictimRow
    rank: int | None

    @property
    def order(self) -> tuple[float, float, str]:
        worst = estimate(self.row.worst)
        return (self.rank or float("inf"), -(worst.mean if worst else -1), self.row.victim.defense.name)


def _worst(victim: ServedVictim) -> BySeed:
    found = [victim.by_seed(name) for name in robust_metrics(victim.cells, VICTIM)]
    seeds = {seed for accuracies in found for seed in accuracies}
    return {seed: min(accuracies[seed] for accuracies in found if seed in accuracies) for seed in seeds}


def _victims(studies: Studies) -> Table:
    measured = _measured(studies.cells, VICTIM)
    shown: Sequence[Column[_Ranked]] = (
        columns.rank(lambda ranked: ranked.rank, "gain over the undefended victim"),
        columns.defense(lambda ranked: ranked.row.victim.defense.name),
        columns.method(lambda ranked: ranked.row.victim.defense.method),
        columns.of_victim("victim_acc", lambda ranked: ranked.row.victim),
        *(columns.of_victim(name, _victim, _drop_order(name)) for name in measured),
        *_WORST,
        columns.utility_loss(lambda ranked: ranked.row.utility_loss, drop_order=2),
    )
    return Table(MAIN, "Victims", "", shown, filled(shown, _ranked(studies) if measured else []))


def _victim(ranked: _Ranked) -> ServedVictim:
    return ranked.row.victim


def _pairing(row: AttackRow) -> Pairing:
    return row.pairing


_WORST: Sequence[Column[_Ranked]] = (
    Column(
        "worst_robust",
        "Worst adversarial accuracy (%)",
        Kind.SHARE,
        "the lowest of the victim's adversarial accuracies",
        lambda ranked: estimate(ranked.row.worst),
    ),
    Column(
        "gain_over_undefended",
        "Over undefended (points)",
        Kind.DIFFERENCE,
        "worst adversarial accuracy minus the undefended victim's, paired by seed",
        lambda ranked: ranked.row.gain,
    ),
)


def _ranked(studies: Studies) -> list[_Ranked]:
    undefended = next((victim for victim in studies.victims.values() if victim.defense.is_reference), None)
    rows = [VictimRow(victim, undefended) for victim in studies.victims.values()]
    found = ranks([row.gain for row in rows])
    return sorted(map(_Ranked, rows, found), key=lambda ranked: ranked.order)


def _students(study: Study, section: str) -> Table:
    rows = [*study.attack_rows, *(AttackRow(study, pairing) for pairing in study.baselines)]
    measured = [*_measured(study.cells, STUDENT), *columns.measured(study.cells, [TRANSFER])]
    shown: Sequence[Column[AttackRow]] = (
        columns.student(lambda row: row.study.student),
        columns.scenario(lambda row: row.study.scenario),
        columns.defense(lambda row: row.pairing.defense.name if row.pairing.defense else NO_QUERY),
        columns.attack(lambda row: row.pairing.attack.name),
        columns.fraction(lambda row: row.pairing.subset.fraction),
        columns.student_acc(lambda row: row),
        *(columns.of_student(name, _pairing, _drop_order(name)) for name in measured),
    )
    kept = [row for row in rows if any(row.pairing.mean(name) for name in measured)]
    return Table("attacks", "Students", section, shown, filled(shown, kept), folded=True)


def _measured(cells: Iterable[Cell], side: str) -> list[str]:
    """The metrics of robustness that some cell has of this side, in the order of their declaration."""
    robust = [f"{side}_{part}" for part in ("robust_", "cw_", "sensitivity")]
    return columns.measured(cells, (name for name in METRICS if name.startswith(tuple(robust))))


def _drop_order(name: str) -> int:
    """On a narrow terminal, adversarial accuracies stay longer than the rest."""
    return 1 if "_robust_" in name else 0 if name == TRANSFER else 3


def _implementation(cells: Iterable[Cell]) -> str:
    """Whose attacks these were: numbers of another implementation are not comparable to the last digit."""
    versions = sorted({cell.machine["torchattacks"] for cell in cells if "torchattacks" in cell.machine})
    return (
        f"Attacks: {' '.join(['torchattacks', ', '.join(versions)]).strip()}. AutoAttack is the standard sequence "
        "of its four parts, which make fewer model calls than the original code and can miss an image that the original "
        "code finds an adversarial example for; C&W is for one fixed c. Numbers that papers report with the original "
        "codes are not comparable."
    )


_NOTES = (
    "Rank: 1 + the number of defenses whose gain over the undefended victim in worst adversarial accuracy has an interval "
    "wholly above; overlapping intervals share a rank. Adversarial accuracy counts clean mistakes too, so no defense is "
    "left out for its utility loss.",
    "Victims are evaluated as hardened models (white box), transfer on served answers, where the defense was in the "
    "attacker's path. High accuracy under weak attacks and low accuracy under strong ones is a sign of masked gradients.",
)
