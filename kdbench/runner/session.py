"""One `kdbench run`: a suite becomes a plan, the plan becomes finished stages, these become result files."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdbench.board.results import FOLDER, Cell, Status, write
from kdbench.errors import KdbenchError
from kdbench.game.fields import plain
from kdbench.game.methods import Precision
from kdbench.runner.executors.local import LocalExecutor
from kdbench.runner.matrix import Outcome, Watcher, data_digest, force, play
from kdbench.runner.plan import Numerics, Plan, PlannedCell, data_stage, make_plan, player
from kdbench.runner.store import Json, Store, sweep, write_json
from kdbench.runner.suite import Suite

PLAN = "plan.json"
PICTURES = "pictures"


@dataclass(frozen=True)
class Options:
    """How to run, which never changes what is computed, but for the device and the threads of a worker."""

    store: Path
    out: Path
    device: str = "auto"
    jobs: int = 0
    threads: int = 1
    data_folder: Path = Path("data")
    force: bool = False


class Session:
    """Plans a suite, plays it, and writes its results."""

    def __init__(self, suite: Suite, options: Options, watcher: Watcher) -> None:
        self.suite, self.options, self.watcher = suite, options, watcher
        self.store = Store(options.store)
        self.jobs = options.jobs or cores()
        device = choose_device(options.device)
        self.numerics = Numerics(device, choose_precision(suite.precision, device), options.threads)

    def plan(self) -> Plan:
        """The plan; reads the data set first if the store does not have it."""
        stage = data_stage(self.suite)
        content = data_digest(stage, self.store, self._executor(), self.watcher, str(self.options.data_folder))
        return make_plan(self.suite, self.numerics, content)

    def run(self) -> list[Cell]:
        """Play the plan and write a result file a cell; the cells."""
        plan = self.plan()
        _refuse_strangers(plan, self.options.out)
        if self.options.force:
            force(plan, self.store)
        self.options.out.mkdir(parents=True, exist_ok=True)
        _write_plan(plan, self.store, self.options.out)
        outcome = play(plan.stages, self.store, self._executor(), self.watcher, str(self.options.data_folder))
        sweep(self.store)
        return record(plan, self.store, outcome, self.options.out)

    def _executor(self) -> LocalExecutor:
        return LocalExecutor(self.store.root, self.jobs)


def record(plan: Plan, store: Store, outcome: Outcome, out: Path) -> list[Cell]:
    """Write a result file for each cell of the plan, and copy the pictures of its first seed."""
    recorder = _Recorder(plan, store, outcome, out)
    cells = [recorder.cell(cell) for cell in plan.cells]
    for cell in cells:
        write(cell, out)
    return cells


class _Recorder:
    """Makes the records of cells from the manifests of their stages."""

    def __init__(self, plan: Plan, store: Store, outcome: Outcome, out: Path) -> None:
        self._plan, self._store, self._outcome, self._out = plan, store, outcome, out
        self._manifests: dict[str, Json] = {}
        suite = plan.suite
        self._protocol = {
            "victim_recipe": plain(suite.victim_recipe),
            "student_recipe": plain(suite.student_recipe),
            "robustness": plain(suite.evasion),
            "numerics": plain(plan.numerics),
        }
        self._classes = int(self._manifest(data_stage(suite).key)["metrics"]["classes"])

    def cell(self, planned: PlannedCell) -> Cell:
        """The record of one cell."""
        status, reason = self._status(planned)
        played = status in (Status.DONE, Status.BYPASSED)
        found = {role: self._manifest(key) for role, key in planned.stages.items()} if played else {}
        suite = self._plan.suite
        cell = Cell(
            suite=suite.name,
            dataset=suite.dataset.label,
            dataset_digest=self._plan.data_digest,
            classes=self._classes,
            victim=suite.victim,
            student=planned.student,
            defense=player(planned.defense) if planned.defense else None,
            attack=player(planned.attack),
            adaptive=planned.attack.instance.adaptive,
            seed=planned.seed,
            threat=plain(planned.threat),
            owned=plain(planned.owned),
            tolerance=suite.tolerance,
            status=status,
            reason=reason,
            metrics=_metrics(found),
            seconds={role: round(manifest["seconds"], 3) for role, manifest in found.items()},
            keys=dict(planned.stages),
            protocol=self._protocol,
            machine=found["score"]["machine"] if found else {},
        )
        return replace(cell, pictures=self._copy_pictures(cell)) if found else cell

    def _status(self, planned: PlannedCell) -> tuple[Status, str]:
        problems = [self._outcome.problems[key] for key in planned.stages.values() if key in self._outcome.problems]
        if planned.skipped:
            return Status.SKIPPED, planned.skipped
        if problems:
            return Status.FAILED, problems[0]
        if planned.bypassed:
            return Status.BYPASSED, "the defense acts only when answering; the attacker has the weights"
        return Status.DONE, ""

    def _manifest(self, key: str) -> Json:
        if key not in self._manifests:
            self._manifests[key] = self._store.manifest(key)
        return self._manifests[key]

    def _copy_pictures(self, cell: Cell) -> list[str]:
        if cell.seed != self._plan.suite.seeds[0]:
            return []
        steal = cell.keys["steal"]
        copies = []
        for name in self._manifest(steal)["pictures"]:
            copy = Path(PICTURES) / f"{cell.name}--{name}"
            (self._out / PICTURES).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._store.path(steal) / name, self._out / copy)
            copies.append(copy.as_posix())
        return copies


def _metrics(found: Mapping[str, Json]) -> dict[str, float]:
    """The referee's numbers and the query count; what methods wrote down carries the name of its stage."""
    numbers: dict[str, float] = {}
    for role in ("train", "harden", "steal"):
        if role in found and not (role == "harden" and found[role]["kind"] == "train"):
            numbers |= {f"{role}.{name}": value for name, value in found[role]["metrics"].items()}
    if "steal.queries" in numbers:
        numbers["queries"] = numbers.pop("steal.queries")
    for role in ("audit", "score"):
        numbers |= found[role]["metrics"] if role in found else {}
    return numbers


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str) -> str:
    """The device to use; "auto" is the best there is. Raises `KdbenchError` when a named one is absent."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[name]:
        raise KdbenchError(
            f"The device '{name}' is not available here. Available: {', '.join(d for d in there if there[d])}."
        )
    return name


def choose_precision(name: str, device: str) -> Precision:
    """The precision to use; "auto" is bf16 on a GPU or CPU that computes in it natively, fp32 elsewhere."""
    if name == "auto":
        native = {"cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(), "cpu": _cpu_has_bf16()}
        return "bf16" if native.get(device, False) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        abilities = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch does not tell
        return False
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def _refuse_strangers(plan: Plan, out: Path) -> None:
    """A results folder holds one matrix: mixed with another's cells, its leaderboard would compare what nobody played."""
    expected = {f"{cell.name}.json" for cell in plan.cells}
    strangers = sorted(path.name for path in (out / FOLDER).glob("*.json") if path.name not in expected)
    if strangers:
        raise KdbenchError(
            f"{out} holds {len(strangers)} cells of another matrix ({strangers[0]}, ...). "
            "Choose another folder with --out, or remove it."
        )


def _write_plan(plan: Plan, store: Store, out: Path) -> None:
    """Say what this folder is to hold, for `kdbench status`."""
    stages = [{"key": stage.key, "label": stage.label} for stage in plan.stages.values()]
    write_json(
        out / PLAN, {"store": os.path.relpath(store.root, out), "stages": stages, "cells": [c.name for c in plan.cells]}
    )
