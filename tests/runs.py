"""What the tests of the engine share: a tiny suite, how it is run, and what of a run must not change."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.engine.manifest import Manifest
from kdbench.engine.plan import Plan, PlannedCell, Stage
from kdbench.engine.scheduler import ProgressDisplay
from kdbench.engine.store import Store
from kdbench.records import Cell, read
from kdbench.runs.request import Options
from kdbench.runs.session import Session
from kdbench.suites.suite import Suite

TINY = """
seeds = 1
defenses = ["none", "nasty", "stingy"]
attacks = ["kd", "partial-kd"]
dataset = "blobs"

[victim]
network = "mini-8"
recipe = { epochs = 2, batch = 32, lr = 0.05 }

[student]
network = "mini-8"
recipe = { epochs = 2, batch = 32, lr = 0.05 }

[robustness]
level = "none"

[attack.partial-kd]
fraction = 0.5
"""
Json = dict[str, Any]
ONE_CELL: Json = {"defenses": ["none"], "attacks": ["kd"], "baselines": []}
ONE_CELL_STAGES = [
    "read blobs",
    "train the victim, seed 0",
    "kd from none, seed 0",
    "evaluate kd on none, seed 0",
    "evaluate none, seed 0",
]
DIVERGES: Json = {"defense.nasty.omega": 1e30, "defense.nasty.clip": 0.0}
ON_NASTY = {
    "hard-label from nasty, seed 0",
    "kd from nasty, seed 0",
    "partial-kd from nasty, seed 0",
    "evaluate hard-label on nasty, seed 0",
    "evaluate kd on nasty, seed 0",
    "evaluate partial-kd on nasty, seed 0",
    "evaluate nasty, seed 0",
}


@dataclass
class RecordedProgress(ProgressDisplay):
    """Keeps what it is told."""

    begun: list[tuple[int, int]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    finished: list[Stage] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    most: int = 0
    closed: int = 0

    def begin(self, stages: dict[str, Stage], cached: int) -> None:
        self.begun.append((len(stages), cached))

    def started(self, stage: Stage) -> None:
        self.titles.append(stage.title)

    def ended(self, stage: Stage, seconds: float, problem: str) -> None:
        assert seconds > 0
        self.finished.append(stage)
        if problem:
            self.problems[stage.title] = problem

    def dropped(self, stages: list[Stage]) -> None:
        self.lost |= {stage.title for stage in stages}

    def tick(self, running: dict[str, tuple[Stage, float, str]]) -> None:
        self.most = max(self.most, len(running))

    def close(self) -> None:
        self.closed += 1


def options(folder: Path, **changes: Any) -> Options:
    values: Json = {"store": folder / "store", "out": folder / "out", "device": "cpu", "jobs": 2}
    return Options(**values | changes)


def run(
    suite: Suite, folder: Path, progress_display: RecordedProgress | None = None, **changes: Any
) -> dict[str, Cell]:
    """Run a suite into `folder`; its cells by name."""
    cell_counts = Session(suite, options(folder, **changes), progress_display or RecordedProgress()).run()
    cells = read(options(folder, **changes).out)
    assert cell_counts == Counter((cell.status, cell.reason) for cell in cells)
    return {cell.name: cell for cell in cells}


def numbers(cells: Mapping[str, Cell]) -> dict[str, Any]:
    """What of cells must not depend on who ran them when."""
    return {name: (cell.status, cell.reason, cell.metrics, cell.keys) for name, cell in cells.items()}


def digests(store: Store) -> dict[str, dict[str, str]]:
    """The digests of all files of all finished stages."""
    return {key: store.manifest(key).files for key in store.finished()}


@dataclass(frozen=True)
class FinishedRun:
    """The tiny suite, run once for all tests; nobody changes this folder."""

    folder: Path
    cells: dict[str, Cell]
    progress_display: RecordedProgress

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def copy(self, folder: Path) -> Path:
        """`folder`, with a copy of the store in it."""
        shutil.copytree(self.folder / "store", folder / "store")
        return folder


def cell(plan: Plan, defense: str | None, attack: str, fraction: float = 1.0) -> PlannedCell:
    """The planned cell of a defense (None: the baseline on that subset of the data) and an attack; there is one."""
    cells = [c for c in plan.cells if (c.defense and c.defense.name) == defense and c.attack.name == attack]
    [found] = [c for c in cells if defense or c.subset.fraction == fraction]
    return found


ATTACK_RUNS_ON = {
    who: {f"{a} from {who}" for a in ("hard-label", "kd", "partial-kd")} for who in ("none", "nasty", "stingy")
}
EVALUATIONS_ON = {
    who: {f"evaluate {a} on {who}" for a in ("hard-label", "kd", "partial-kd")} for who in ("none", "nasty", "stingy")
}
VICTIM_EVALUATIONS = {f"evaluate {who}" for who in ("none", "nasty", "stingy")}
ATTACK_RUNS = ATTACK_RUNS_ON["none"] | ATTACK_RUNS_ON["nasty"] | ATTACK_RUNS_ON["stingy"]
STUDENT_EVALUATIONS = EVALUATIONS_ON["none"] | EVALUATIONS_ON["nasty"] | EVALUATIONS_ON["stingy"]
VICTIMS = {"train the victim", "harden by nasty"} | VICTIM_EVALUATIONS | ATTACK_RUNS | STUDENT_EVALUATIONS


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def publish(store: Store, key: str) -> str:
    store.publish(key, store.scratch(key), Manifest(key.partition("/")[0]))
    return "the worker ended with exit code 0"


def until(claim: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `claim` holds."""
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.005)
