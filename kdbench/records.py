"""Records: what a run leaves behind and a leaderboard reads. One typed `Cell` a line of `cells.jsonl`, sorted by name."""

from collections.abc import Collection, Iterable, Iterator
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Le
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kdbench import migration
from kdbench.atomic import replacing
from kdbench.errors import KdbenchError, invalid
from kdbench.metrics import METRICS

FILE = "cells.jsonl"
ACCESS = ("nothing", "label", "topk", "probs", "weights")  # the lowest first
T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Share = Annotated[float, Ge(0), Le(1)]
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]


def _one_of(names: Collection[str], what: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"must be {what}")
        return name

    return AfterValidator(check)


AccessName = Annotated[str, _one_of(ACCESS, f"one of {', '.join(ACCESS)}")]
MetricName = Annotated[str, _one_of(METRICS, "a metric that kdbench.metrics declares")]


class Status(StrEnum):
    """How a cell ended. Bypassed: it ran, but the defense was not in this attacker's path, so it is not scored by it."""

    DONE = "done"
    BYPASSED = "bypassed"
    SKIPPED = "skipped"
    FAILED = "failed"

    @property
    def scored(self) -> bool:
        """Whether a cell that ended so has metrics."""
        return self in (Status.DONE, Status.BYPASSED)


@dataclass(frozen=True, config=_STRICT)
class MethodRecord:
    """A method in a cell: its name in the suite, the registered method behind it, its fields, and where it comes from.

    recipe: a defense's own training recipe where it differs from the victim's.
    """

    name: str
    method: str
    fields: dict[str, Any]
    origin: str
    recipe: dict[str, Any] | None = None


@dataclass(frozen=True, config=_STRICT)
class DefenseRecord(MethodRecord):
    """stateful: its answers may depend on earlier queries. is_reference: it is the undefended victim."""

    stateful: bool = False
    is_reference: bool = False


@dataclass(frozen=True, config=_STRICT)
class AttackRecord(MethodRecord):
    """adaptive: it is made to undo defenses. labels_only: it learns from labels alone, whatever else it may see."""

    adaptive: bool = False
    labels_only: bool = False


@dataclass(frozen=True, config=_STRICT)
class ScenarioRecord:
    """What the attacker may see (one of `ACCESS`; topk: how many classes), ask (budget; None: no limit) and own.

    data: share of the training images; labels: whether with their labels.
    """

    name: str
    access: AccessName
    topk: Count
    budget: Whole | None
    data: Share
    labels: bool


@dataclass(frozen=True, config=_STRICT)
class SubsetRecord:
    """The share of the attacker's images that the attack uses, and the seed that chooses them."""

    fraction: Share = 1.0
    seed: Whole = 0


@dataclass(frozen=True, config=_STRICT)
class ReportedNumber:
    """What a paper reports of a metric: its value, where it stands, and the evidence for it ("memory": unverified)."""

    metric: MetricName
    value: float
    source: str
    evidence: str


@dataclass(frozen=True, config=_STRICT)
class NumericsRecord:
    """What the arithmetic of the run depended on. fuse: how many students a worker may train as one network."""

    device: str = "cpu"
    precision: str = "fp32"
    threads: Count = 1
    compile: bool = False
    fuse: Count = 1


@dataclass(frozen=True, config=_STRICT)
class Protocol:
    """How networks were trained and attacked: recipes and evaluation settings, as the suite file has them."""

    victim_recipe: dict[str, Any]
    student_recipe: dict[str, Any]
    robustness: dict[str, Any]
    numerics: NumericsRecord


@dataclass(frozen=True, config=_STRICT)
class Cell:
    """One defense against one attack by one student with one seed; without a defense it is a no-query baseline.

    metrics: under the names of `METRICS`; accuracies are counts over all images of a split, as fractions. numbers: what the
    methods report of themselves, under the stage's name ("steal.chosen_temperature"). seconds, keys: by stage, in the
    store where the run was made. subset: which of the attacker's images were used. reported: what papers say of this cell.
    """

    suite: str
    dataset: str
    dataset_digest: str
    classes: Count
    victim: str
    student: str
    defense: DefenseRecord | None
    attack: AttackRecord
    seed: int
    scenario: ScenarioRecord
    subset: SubsetRecord
    tolerance: Annotated[float, Ge(0)]
    status: Status
    reason: str
    metrics: dict[MetricName, float]
    numbers: dict[str, float]
    seconds: dict[str, Annotated[float, Ge(0)]]
    keys: dict[str, str]
    pictures: tuple[str, ...]
    protocol: Protocol
    machine: dict[str, str]
    reported: tuple[ReportedNumber, ...] = ()
    schema: Literal[2] = 2

    def __post_init__(self) -> None:
        if self.status is not Status.DONE and not self.reason:
            raise ValueError(f"must say a reason with the status '{self.status}'")
        if self.status is Status.BYPASSED and self.defense is None:
            raise ValueError("must name a defense with the status 'bypassed'")
        if self.status.scored and "student_acc" not in self.metrics:
            raise ValueError(f"must have the metric student_acc with the status '{self.status}'")
        if not self.status.scored and self.metrics:
            raise ValueError(f"must have no metrics with the status '{self.status}'")

    @property
    def name(self) -> str:
        """Unique in a results folder."""
        return _name_of(self)


def cell_name(
    defense: str | None,
    attack: str,
    student: str,
    seed: int,
    fraction: float,
    subset: int,
    *,
    scenario: str = "default",
) -> str:
    """The name of a cell; a baseline's (no defense) says on which data subset it was trained."""
    against = defense or f"baseline-{fraction:g}-{subset}"
    under = "" if scenario == "default" else f"--{scenario}"
    return f"{against}--{attack}--{student.replace(':', '-').replace('/', '-')}--seed{seed}{under}"


def _name_of(cell: "Cell | _Named") -> str:
    defense = cell.defense.name if cell.defense else None
    subset = cell.subset.fraction, cell.subset.seed
    return cell_name(defense, cell.attack.name, cell.student, cell.seed, *subset, scenario=cell.scenario.name)


_CELL = TypeAdapter(Cell)


def write(cells: Iterable[Cell], folder: Path) -> Path:
    """Write the records of a results folder, replacing those that it has, in one step."""
    return write_sorted(sorted(cells, key=_name_of), folder)


def write_sorted(cells: Iterable[Cell], folder: Path) -> Path:
    """The same for cells that come in the order of their names: only one of them needs to be in memory."""
    last = ""
    with replacing(folder / FILE) as file:
        for cell in cells:
            assert last < cell.name, f"{cell.name} comes after {last}"
            last = cell.name
            file.write(_CELL.dump_json(cell) + b"\n")
    return folder / FILE


def read(folder: Path) -> list[Cell]:
    """All cells of a results folder, in the order of their names; the old layout is read, too.

    Raises `KdbenchError` when there is none, or one is damaged: file, line, field, value, and what is allowed there.
    """
    found = _old_cells(folder) if is_old(folder) else (_parsed(_CELL, *line) for line in _lines(folder))
    cells = sorted(found, key=_name_of)
    if not cells:
        raise KdbenchError(f"There are no results in {folder}: it has no {FILE}. `kdbench run --out` makes one.")
    for one, other in pairwise(cells):
        if one.name == other.name:
            raise KdbenchError(f"{folder} holds two cells of the name '{one.name}'.")
    return cells


def is_old(folder: Path) -> bool:
    """Whether a results folder has the old layout, and that only: `kdbench convert` rewrites it."""
    return migration.is_old(folder) and not (folder / FILE).is_file()


def names(folder: Path) -> Iterator[str]:
    """The names of the cells in a results folder; none where there are no results."""
    if is_old(folder):
        yield from (cell.name for cell in _old_cells(folder))
    yield from (_name_of(_parsed(_NAMED, *line)) for line in _lines(folder))


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _NamedMethod:
    name: str


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _Named:
    """The part of a cell that its name is made of: reading only that takes a fraction of the time."""

    defense: _NamedMethod | None
    attack: _NamedMethod
    student: str
    seed: int
    subset: SubsetRecord
    scenario: _NamedMethod


_NAMED = TypeAdapter(_Named)


def _lines(folder: Path) -> Iterator[tuple[bytes, str]]:
    """The lines of the records of a folder, each with the place where it stands."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line, f"{path}, line {number}"
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise KdbenchError(f"{path} cannot be read: {error.strerror}.") from None


def _old_cells(folder: Path) -> Iterator[Cell]:
    for path in migration.files(folder):
        yield _parsed(_CELL, migration.migrated(path), str(path))


def _parsed(adapter: TypeAdapter[T], line: bytes, where: str) -> T:
    try:
        return adapter.validate_json(line, strict=True)
    except ValidationError as error:
        raise invalid(error, where) from None
