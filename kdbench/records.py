"""A cell's record: one JSON file a cell, all that leaderboards and plots know of a run."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from kdbench.errors import KdbenchError
from kdbench.game.fields import Share, Whole, build, plain

SCHEMA = 1
FOLDER = "cells"


class Status(StrEnum):
    """How a cell ended. Bypassed: played, but the defense was not in this attacker's path, so it is not scored by it."""

    DONE = "done"
    BYPASSED = "bypassed"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True)
class ReportedNumber:
    """What a paper says of a metric: its value, where it stands, and the evidence for it ("memory": unverified)."""

    metric: str
    value: float
    source: str
    evidence: str


@dataclass(frozen=True)
class MethodRecord:
    """A method in a cell: its label in the benchmark file, the registered method behind it, and its fields.

    recipe: a defense's own recipe where it does not train as the victim was trained.
    """

    name: str
    method: str
    fields: dict[str, Any]
    origin: str
    recipe: dict[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """One defense against one attack by one student with one seed; without a defense it is a baseline.

    metrics: fractions, counts and norms under the names of `METRICS`; seconds: by stage kind; owned: the part of the
    training data that the thief used (fraction, seed); published: what papers say of this cell; stateful: whether the
    defense declares that answers may depend on what was asked before. Accuracies are counts over all images of a
    split, as fractions.
    """

    suite: str
    dataset: str
    dataset_digest: str
    classes: int
    victim: str
    student: str
    defense: MethodRecord | None
    attack: MethodRecord
    adaptive: bool
    seed: int
    scenario: dict[str, Any]
    subset: dict[str, Any]
    tolerance: float
    status: Status
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    reported: list[ReportedNumber] = field(default_factory=list)
    stateful: bool = False
    schema: int = SCHEMA

    @property
    def name(self) -> str:
        """The cell's file name without its ending; unique in a results folder."""
        defense = self.defense.name if self.defense else None
        subset = self.subset["fraction"], self.subset["seed"]
        return cell_name(defense, self.attack.name, self.student, self.seed, *subset)


def cell_name(defense: str | None, attack: str, student: str, seed: int, fraction: float, subset: int) -> str:
    """The name of a cell; a baseline's (no defense) says on which part of the data it was trained."""
    against = defense or f"baseline-{fraction:g}-{subset}"
    return f"{against}--{attack}--{student.replace(':', '-').replace('/', '-')}--seed{seed}"


METRICS = {
    "victim_acc": "test accuracy of the victim as served to the public",
    "victim_val_acc": "the same on validation data",
    "victim_parameters": "weights of the victim (likewise student_*)",
    "victim_entropy": "mean entropy of the served answers to test images, in nats",
    "victim_distortion": "mean L1 distance of the served answers from the hardened model's own",
    "victim_consistency": "share of questions that get the same answer when they are put again",
    "student_acc": "test accuracy of the student",
    "student_val_acc": "the same on validation data",
    "fidelity": "share of test images on which student and served victim give the same label",
    "queries": "images that the oracle answered",
    "transfer": "share of adversarial examples made on the student that fool the victim as served",
    "victim_adv_fgsm": "adversarial accuracy of the hardened model under FGSM (likewise pgd, square, autoattack; student_adv_*)",
    "victim_cw_success": "share of rightly classified images that C&W (L2) fells (likewise student_*)",
    "victim_cw_l2": "mean L2 norm of the successful C&W perturbations, pixels in [0,1] (likewise student_*)",
    "victim_sensitivity": "mean |d(sum of logits)/d(pixel)| over the test images (likewise student_*)",
}


def write(cell: Cell, folder: Path) -> Path:
    """Write `cell` under `folder`; an interrupted run leaves no half-written file."""
    path = folder / FOLDER / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plain(cell), indent=1, sort_keys=True) + "\n")
    return path


def read(folder: Path) -> list[Cell]:
    """All cells under `folder`, in the order of their names. Raises `KdbenchError` when there is none or one is damaged."""
    paths = sorted((folder / FOLDER).glob("*.json"))
    if not paths:
        raise KdbenchError(
            f"There are no results in {folder}: it has no {FOLDER}/*.json. Run `kdbench run --out {folder}` first."
        )
    return [_cell(path) for path in paths]


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@dataclass(frozen=True)
class _DataSubset:
    """What stands in the table `subset` of a cell: as in `kdbench.game.data`, which would bring torch along."""

    fraction: Share
    seed: Whole


def _cell(path: Path) -> Cell:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KdbenchError(f"{path} is not a result file: {error}.") from None
    except OSError as error:
        raise KdbenchError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
        raise KdbenchError(f"{path} has not the result schema {SCHEMA} that this version reads.")
    for table in ("metrics", "seconds"):
        _check_numbers(values.get(table), f"{path}.{table}")
    cell = build(Cell, values, str(path))
    build(_DataSubset, cell.subset, f"{path}.owned")
    return cell


def _check_numbers(table: object, where: str) -> None:
    """Of many numbers the wrong one is named; a table that is none is for others to name."""
    for name, value in table.items() if isinstance(table, Mapping) else ():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise KdbenchError(f"{where}.{name} must be a finite number, not {value!r}.")
