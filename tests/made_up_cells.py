"""Made-up cells for tests of the board: every number was chosen so that a person can check the result by hand."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdbench import records
from kdbench.board.document import Board, Value
from kdbench.board.studies import Studies
from kdbench.board.study import DefenseRow, Study
from kdbench.board.tables.accuracy import accuracy_board
from kdbench.board.tables.robustness import robustness_board
from kdbench.metrics import METRICS
from kdbench.records import (
    AttackRecord,
    Cell,
    DefenseRecord,
    NumericsRecord,
    Protocol,
    ReportedNumber,
    ScenarioRecord,
    Status,
    SubsetRecord,
)

PROTOCOL = Protocol({"epochs": 8}, {"epochs": 4}, {"images": 100}, NumericsRecord())
SCENARIO = ScenarioRecord("default", "probs", 5, None, 1.0, True)
UNDEFENDED, LABELS_ONLY, ADAPTIVE = "none", "hard-label", "tuned"


def defense(name: str, **fields: Any) -> DefenseRecord:
    """A defense; `none` is the undefended victim."""
    return DefenseRecord(name, name, fields, "made up", is_reference=name == UNDEFENDED)


def attack(name: str, **fields: Any) -> AttackRecord:
    """An attack; `hard-label` learns from labels only, and `tuned` is adaptive."""
    return AttackRecord(name, name, fields, "made up", adaptive=name == ADAPTIVE, labels_only=name == LABELS_ONLY)


def made_up(against: str | None, by: str, seed: int, student_acc: float, **changes: Any) -> Cell:
    """A made-up cell that is done; `val` (validation accuracy), `more` (metrics) and fields by name."""
    metrics = {"student_acc": student_acc, "student_val_acc": changes.pop("val", student_acc)}
    if against:
        metrics |= {"victim_acc": changes.pop("victim_acc", 0.96), "queries": 1000.0, "fidelity": 0.9}
    metrics |= changes.pop("more", {})
    cell = Cell(
        suite="made-up",
        dataset="nothing",
        dataset_digest="0" * 8,
        classes=10,
        victim="big",
        student="small",
        defense=defense(against) if against else None,
        attack=attack(by),
        seed=seed,
        scenario=SCENARIO,
        subset=SubsetRecord(),
        tolerance=0.02,
        status=Status.DONE,
        reason="",
        metrics=metrics,
        numbers={},
        seconds={},
        keys={},
        pictures=(),
        protocol=PROTOCOL,
        machine={},
    )
    return replace(cell, **changes)


def over_seeds(against: str | None, by: str, student_accs: Iterable[float], **changes: Any) -> list[Cell]:
    """One cell a seed, from seed 0."""
    return [made_up(against, by, seed, acc, **changes) for seed, acc in enumerate(student_accs)]


def ended(cells: Iterable[Cell], status: Status, reason: str = "a reason") -> list[Cell]:
    """The same cells, ended otherwise; only bypassed ones keep their numbers."""
    return [replace(c, status=status, reason=reason, metrics=c.metrics if status.scored else {}) for c in cells]


def only(cells: Iterable[Cell]) -> Study:
    """The study of the one student."""
    (found,) = Studies.of(cells).all
    return found


def by_name(cells: Iterable[Cell]) -> dict[str, DefenseRow]:
    """The rows of the ranking by the defense's name, in the board's order."""
    return {row.defense.name: row for row in only(cells).rows}


def leaderboard(cells: Iterable[Cell]) -> Board:
    """The accuracy board."""
    return accuracy_board(Studies.of(cells))


def robustness(cells: Iterable[Cell]) -> Board:
    """The robustness board."""
    return robustness_board(Studies.of(cells))


def rows(board: Board, table: str) -> list[dict[str, Value]]:
    """All rows of the tables of that name, by the names of the columns."""
    return [
        dict(zip((column.name for column in found.columns), row, strict=True))
        for found in board.tables
        if found.name == table
        for row in found.rows
    ]


def write_cells(cells: Iterable[Cell], folder: Path) -> Path:
    """Put the cells into a results folder."""
    folder.mkdir(exist_ok=True)
    records.write(cells, folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """The content of everything under `folder` by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ROBUST = {
    "victim_robust_fgsm": 0.5,
    "victim_robust_pgd": 0.3,
    "student_robust_fgsm": 0.4,
    "student_robust_pgd": 0.2,
    "victim_cw_l2": 0.8,
    "transfer": 0.6,
}
NO_DATA = SubsetRecord(0.0, 0)


def matrix(more: Mapping[str, float] = ROBUST) -> list[Cell]:
    """Three defenses against three attacks and two baselines, with every way in which a cell can end."""
    steps = [0.0, 0.01, 0.02]
    cells = []
    for index, name in enumerate((UNDEFENDED, "nasty", "stingy")):
        changes: dict[str, Any] = {"victim_acc": 0.96 - 0.005 * index, "more": dict(more)}
        cells += over_seeds(name, "kd", [0.9 - 0.05 * index + d for d in steps], **changes)
        cells += over_seeds(name, LABELS_ONLY, [0.85 - 0.01 * index - d for d in steps], **changes)
        weights = over_seeds(name, "inversion", [0.7 + d for d in steps], subset=NO_DATA, **changes)
        cells += ended(weights, Status.BYPASSED) if name == "stingy" else weights
    cells += ended(over_seeds("nasty", ADAPTIVE, [0.5] * 2), Status.FAILED, "training diverged")
    cells += ended(over_seeds(UNDEFENDED, ADAPTIVE, [0.5] * 2), Status.SKIPPED, "needs probs")
    cells += over_seeds(None, "cross-entropy", [0.8, 0.81, 0.82])
    return cells + over_seeds(None, "label-smoothing", [0.83, 0.8, 0.86])


def everything() -> list[Cell]:
    """The same with every declared metric, a number of a method, and numbers that papers report."""
    values = {name: 0.1 + 0.01 * index for index, name in enumerate(METRICS) if not name.endswith("_acc")}
    reported = (ReportedNumber("student_acc", 0.75, "table 1", "paper"),)
    return [
        replace(
            cell,
            metrics={name: v for name, v in values.items() if cell.defense or not name.startswith("victim_")}
            | cell.metrics
            if cell.status.scored
            else {},
            numbers={"steal.chosen_temperature": 4.0},
            reported=reported,
        )
        for cell in matrix(more={"victim_val_acc": 0.95})
    ]
