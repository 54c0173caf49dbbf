"""The cells of a results folder as a board reads them: checked to belong together, and a study for each student and scenario."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kdbench.board.pairing import ServedVictim
from kdbench.board.study import Study, by_defense
from kdbench.errors import KdbenchError
from kdbench.records import Cell, MethodRecord, read

_SHARED: Mapping[str, Callable[[Cell], object]] = {
    "suite": lambda cell: cell.suite,
    "dataset": lambda cell: cell.dataset,
    "dataset_digest": lambda cell: cell.dataset_digest,
    "victim": lambda cell: cell.victim,
    "tolerance": lambda cell: cell.tolerance,
}


@dataclass(frozen=True)
class Facts:
    """What all cells of a folder share, its students and its seeds. tolerance: of utility loss, a fraction."""

    suite: str
    dataset: str
    dataset_digest: str
    classes: int
    victim: str
    students: tuple[str, ...]
    seeds: tuple[int, ...]
    tolerance: float


@dataclass(frozen=True, eq=False)
class Studies:
    """A results folder: its cells by name, and what they come to. Made once, and handed to all tables, plots and formats."""

    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> "Studies":
        """Raises `KdbenchError` when there are no cells, or cells of several suites."""
        ordered = tuple(sorted(cells, key=lambda cell: (cell.student, cell.name)))
        _check_one_suite(ordered)
        return cls(ordered)

    @classmethod
    def read(cls, folder: Path) -> "Studies":
        """Of the cells in `folder`. Raises `KdbenchError` when there are none, or one is damaged."""
        return cls.of(read(folder))

    @cached_property
    def facts(self) -> Facts:
        """What all cells share."""
        first = self.cells[0]
        students = tuple(sorted({cell.student for cell in self.cells}))
        seeds = tuple(sorted({cell.seed for cell in self.cells}))
        about = (first.suite, first.dataset, first.dataset_digest, first.classes, first.victim)
        return Facts(*about, students, seeds, first.tolerance)

    @cached_property
    def all(self) -> Sequence[Study]:
        """One study for each student and scenario, by their names."""
        groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
        for cell in sorted(self.cells, key=lambda cell: cell.seed):
            groups[cell.student, cell.scenario.name].append(cell)
        return [Study(*names, tuple(own)) for names, own in sorted(groups.items())]

    @cached_property
    def victims(self) -> Mapping[str, ServedVictim]:
        """The victims of all students by the name of the defense, the reference first."""
        return by_defense(self.cells)

    def title(self, study: Study) -> str:
        """What tells a study from the others of the folder: student, scenario, both, or nothing where there is one."""
        words = [f"student {study.student}"] if len(self.facts.students) > 1 else []
        words += [f"scenario {study.scenario}"] if len({other.scenario for other in self.all}) > 1 else []
        return ", ".join(words)


def _check_one_suite(cells: Sequence[Cell]) -> None:
    if not cells:
        raise KdbenchError("There is no cell to make a leaderboard of.")
    for name, of in _SHARED.items():
        values = sorted({str(of(cell)) for cell in cells})
        if len(values) > 1:
            raise KdbenchError(
                f"The results are not of one suite: {name} is {' and '.join(values)}. Give each its own folder."
            )
    _check_names("defense", [cell.defense for cell in cells if cell.defense])
    _check_names("attack", [cell.attack for cell in cells])


def _check_names(kind: str, methods: Iterable[MethodRecord]) -> None:
    settings: dict[str, str] = {}
    for method in methods:
        text = f"{method.method} {json.dumps(method.fields, sort_keys=True)}"
        if settings.setdefault(method.name, text) != text:
            several = f"{settings[method.name]} and {text}"
            raise KdbenchError(f"The {kind} '{method.name}' is several things: {several}. Give each its own name.")
