"""The robustness board: which victims withstand evasion, and what stolen students give away."""

from collections.abc import Iterable, Sequence
from typing import Any

from kdbench.board.document import Board, Column, Kind, Table, interval_note
from kdbench.board.intervals import BySeed, Estimate, estimate, paired, ranks
from kdbench.board.study import NO_QUERY, REFERENCE, Pairing, Study, facts, studies, victim_by_seed
from kdbench.records import Cell, MethodRecord

VICTIM, STUDENT = "victim", "student"

_TITLES = {"fgsm": "FGSM", "pgd": "PGD", "square": "Square", "autoattack": "AutoAttack"}
_MORE = {
    "cw_success": ("C&W success (%)", Kind.SHARE, "share of rightly classified images that C&W (L2) fells"),
    "cw_l2": ("C&W L2", Kind.NORM, "mean L2 norm of the successful C&W perturbations, pixels in [0,1]"),
    "sensitivity": ("Sensitivity", Kind.NORM, "mean |d(sum of logits)/d(pixel)| over the test images"),
}
_TRANSFER = Column(
    "transfer", "Transfer (%)", Kind.SHARE, "share of adversarial examples made on the student that fool the victim"
)
_NAMES = (
    Column(
        "rank", "Rank", Kind.WHOLE, "1 + the number of defenses whose interval of the gain over none lies wholly above"
    ),
    Column("defense", "Defense", Kind.TEXT, "the defense's label in the benchmark"),
    Column("method", "Method", Kind.TEXT, "the registered method behind the label", shown=False),
)
_CLEAN = Column("victim_acc", "Clean accuracy (%)", Kind.SHARE, "test accuracy of the victim as served to the public")
_WORST = (
    Column(
        "worst_adv", "Worst adversarial accuracy (%)", Kind.SHARE, "the lowest of the victim's adversarial accuracies"
    ),
    Column(
        "gain_over_none",
        "Over none (points)",
        Kind.DIFFERENCE,
        "worst adversarial accuracy minus none's, paired by seed",
    ),
)
_LOSS = Column(
    "utility_loss", "Utility loss (points)", Kind.DIFFERENCE, "clean accuracy on none minus here", drop_order=2
)
_STUDENT_NAMES = (
    Column("student", "Student", Kind.TEXT, "the student's network", shown=False),
    Column("defense", "Defense", Kind.TEXT, "the defense's label in the benchmark"),
    Column("attack", "Attack", Kind.TEXT, "the attack's label in the benchmark"),
    Column("fraction", "Share of the data", Kind.TEXT, "share of the training data that the thief uses"),
    Column("student_acc", "Clean accuracy (%)", Kind.SHARE, "test accuracy of the student"),
)


def robustness_board(cells: Iterable[Cell]) -> Board:
    """Victims ranked by their worst adversarial accuracy against none's, and a section for each network's students.

    Its tables have no rows when no cell was tried for robustness. Raises `KdbenchError` when there are no cells, or
    cells of several benchmarks.
    """
    all_cells = list(cells)
    found = studies(all_cells)
    about = facts(all_cells)
    tables = [_victims(all_cells), *(_students(student) for student in found)]
    notes = [interval_note(len(about["seeds"])), *_NOTES, _implementation(all_cells)]
    return Board("robustness", f"Robustness: {about['suite']}", about, tables, notes)


def robustness_attacks(cells: Iterable[Cell], side: str) -> list[str]:
    """The evasion attacks that `side` was tried with: `SIDE_adv_NAME` is measured in some cell. Weakest first."""
    prefix = f"{side}_adv_"
    names = {metric.removeprefix(prefix) for cell in cells for metric in cell.metrics if metric.startswith(prefix)}
    known = list(_TITLES)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def title(robustness: str) -> str:
    """How people write the name of an evasion attack."""
    return _TITLES.get(robustness, robustness)


def cells_by_defense(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """All cells against each defense, the reference first, then by label; baselines are left out."""
    ordered = sorted((c for c in cells if c.defense), key=lambda c: (*_order(c.defense), c.name))
    grouped: dict[str, list[Cell]] = {}
    for cell in ordered:
        if cell.defense:
            grouped.setdefault(cell.defense.name, []).append(cell)
    return grouped


def _victims(cells: Sequence[Cell]) -> Table:
    grouped = cells_by_defense(cells)
    reference = next((own for own in grouped.values() if own[0].defense and own[0].defense.method == REFERENCE), [])
    measured = _measured(cells, VICTIM)
    rows = [_victim_row(own, reference, measured) for own in grouped.values()] if measured else []
    columns = [*_NAMES, _CLEAN, *measured, *_WORST, _LOSS]
    return Table("ranking", "Victims", "", columns, _ranked(rows), {})


def _victim_row(cells: Sequence[Cell], reference: Sequence[Cell], measured: Sequence[Column]) -> dict[str, Any]:
    defense = cells[0].defense
    assert defense is not None
    clean, worst = victim_by_seed(cells, "victim_acc"), _worst(cells)
    return {
        "defense": defense.name,
        "method": defense.method,
        "victim_acc": estimate(clean),
        **{column.name: estimate(victim_by_seed(cells, column.name)) for column in measured},
        "worst_adv": estimate(worst),
        "gain_over_none": estimate(paired(worst, _worst(reference))),
        "utility_loss": estimate(paired(victim_by_seed(reference, "victim_acc"), clean)),
    }


def _worst(cells: Sequence[Cell]) -> BySeed:
    """By seed, the lowest adversarial accuracy of the victim."""
    tried = [victim_by_seed(cells, f"{VICTIM}_adv_{name}") for name in robustness_attacks(cells, VICTIM)]
    seeds = {seed for found in tried for seed in found}
    return {seed: min(found[seed] for found in tried if seed in found) for seed in seeds}


def _ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = ranks([row["gain_over_none"] for row in rows])
    return sorted(({**row, "rank": rank} for row, rank in zip(rows, found, strict=True)), key=_by_rank)


def _by_rank(row: dict[str, Any]) -> tuple[float, float, str]:
    worst: Estimate | None = row["worst_adv"]
    return (row["rank"] or float("inf"), -(worst.mean if worst else -1), row["defense"])


def _students(found: Study) -> Table:
    pairings = [pairing for defense in found.defenses for pairing in found.against(defense.name)] + list(
        found.baselines
    )
    cells = [cell for pairing in pairings for cell in pairing.cells]
    measured = _measured(cells, STUDENT)
    if any(_TRANSFER.name in cell.metrics for cell in cells):
        measured.append(_TRANSFER)
    rows = [_student_row(found.student, pairing, measured) for pairing in pairings]
    kept = [row for row in rows if any(row[column.name] for column in measured)]
    return Table("attacks", "Students", found.student, [*_STUDENT_NAMES, *measured], kept, {}, folded=True)


def _student_row(student: str, pairing: Pairing, measured: Sequence[Column]) -> dict[str, Any]:
    return {
        "student": student,
        "defense": pairing.defense.name if pairing.defense else NO_QUERY,
        "attack": pairing.attack.name,
        "fraction": pairing.part[0],
        "student_acc": pairing.mean("student_acc"),
        **{column.name: pairing.mean(column.name) for column in measured},
    }


def _measured(cells: Sequence[Cell], side: str) -> list[Column]:
    """A column for each measure of robustness that some cell has of this side."""
    columns = [_robustness_column(side, name) for name in robustness_attacks(cells, side)]
    for name, (heading, kind, about) in _MORE.items():
        if any(f"{side}_{name}" in cell.metrics for cell in cells):
            columns.append(Column(f"{side}_{name}", heading, kind, f"{side}: {about}", drop_order=3))
    return columns


def _robustness_column(side: str, robustness: str) -> Column:
    about = f"adversarial accuracy of the {side} under {title(robustness)}"
    return Column(f"{side}_adv_{robustness}", f"{title(robustness)} (%)", Kind.SHARE, about, drop_order=1)


def _implementation(cells: Iterable[Cell]) -> str:
    """Whose attacks these were: figures of another implementation are not comparable to the last digit."""
    versions = sorted({cell.machine["torchattacks"] for cell in cells if "torchattacks" in cell.machine})
    return (
        f"Attacks: {' '.join(['torchattacks', ', '.join(versions)]).strip()}. AutoAttack is the standard sequence "
        "of its four parts, which make fewer model calls than the original code and can leave an image standing that "
        "the original fells; C&W is for one fixed c. Published figures of the original codes are not comparable."
    )


def _order(defense: MethodRecord | None) -> tuple[bool, str]:
    return (defense is None or defense.method != REFERENCE, defense.name if defense else "")


_NOTES = (
    "Rank: 1 + the number of defenses whose gain over none in worst adversarial accuracy has an interval wholly above; "
    "overlapping intervals share a rank. Adversarial accuracy counts clean mistakes too, so no defense is left out for "
    "its utility loss.",
    "Victims are judged as hardened models (white box), transfer on served answers, where the defense was in the "
    "thief's path. High accuracy under weak attacks and low under strong ones is a sign of masked gradients.",
)
