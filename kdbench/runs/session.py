"""One `kdbench run`: a suite becomes a plan, the plan becomes finished stages, these become result files."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from kdbench.engine.executors.local import LocalExecutor
from kdbench.engine.plan import Numerics, Plan, PlannedCell, data_stage, make_plan, player
from kdbench.engine.scheduler import Outcome, ProgressDisplay, WorkerOptions, data_digest, force, run_stages
from kdbench.engine.stages import TENSORS
from kdbench.engine.store import Json, Store, collect_garbage, read_json, replacing
from kdbench.engine.tensors import shape_of
from kdbench.errors import KdbenchError
from kdbench.game.data import DataSubset
from kdbench.game.fields import plain
from kdbench.game.methods import Precision
from kdbench.records import FOLDER, Cell, ReportedNumber, Status, write
from kdbench.suites.preflight import try_networks
from kdbench.suites.suite import Choice, Suite

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
    compile: bool = False
    fuse: int = 1
    data_folder: Path = Path("data")
    force: bool = False
    profile: bool = False


@dataclass(frozen=True)
class PlanFile:
    """What a results folder is to hold, as its run said: the store, the stages in it (key -> label), how many cells."""

    store: Path
    stages: dict[str, str]
    cells: int


CellCounts = Counter[tuple[Status, str]]


class Session:
    """Plans a suite, plays it, and writes its results."""

    def __init__(self, suite: Suite, options: Options, progress_display: ProgressDisplay) -> None:
        self.suite, self.options, self.progress_display = suite.stamped(options.data_folder), options, progress_display
        self.store = Store(options.store)
        self.jobs = options.jobs or cores()
        self._worker_options = WorkerOptions(str(options.data_folder), options.profile)
        device = choose_device(options.device)
        precision = choose_precision(suite.precision, device)
        self.numerics = Numerics(device, precision, options.threads, options.compile, options.fuse)

    def plan(self) -> Plan:
        """The plan; reads the data sets first if the store does not have them.

        Raises `KdbenchError` for a data set that cannot be read, and for a network that cannot take its images.
        """
        content = self._content(self.suite.dataset)
        self._try_networks()
        surrogates = {choice.name: self._content(choice) for choice in self.suite.surrogates}
        return make_plan(self.suite, self.numerics, content, surrogates)

    def run_stages(self, plan: Plan) -> Outcome:
        """Do the stages of the plan that are not in the store; what became of them."""
        _refuse_strangers(plan, self.options.out)
        _announce_plan(plan, self.store, self.options.out)
        if self.options.force:
            force(plan, self.store)
        outcome = run_stages(
            plan.stages, self.store, self._executor(), self.progress_display, self._worker_options, self.options.fuse
        )
        collect_garbage(self.store)
        return outcome

    def record(self, plan: Plan, outcome: Outcome) -> CellCounts:
        """Write a result file a cell, and copy the pictures of the first seed; how many cells ended how, and why."""
        recorder = _Recorder(plan, self.store, outcome, self.options.out)
        cell_counts: CellCounts = Counter()
        for planned in plan.cells:
            cell = recorder.cell(planned)
            write(cell, self.options.out)
            cell_counts[cell.status, cell.reason] += 1
        return cell_counts

    def run(self) -> CellCounts:
        """All of it, one after the other."""
        plan = self.plan()
        return self.record(plan, self.run_stages(plan))

    def _content(self, dataset: Choice) -> str:
        return data_digest(
            data_stage(dataset), self.store, self._executor(), self.progress_display, self._worker_options
        )

    def _try_networks(self) -> None:
        key = data_stage(self.suite.dataset).key
        _, channels, height, width = shape_of(self.store.path(key) / TENSORS, "train.x")
        try_networks(self.suite, (channels, height, width), int(self.store.manifest(key)["metrics"]["classes"]))

    def _executor(self) -> LocalExecutor:
        return LocalExecutor(self.store.root, self.jobs)


class _Recorder:
    """Makes the records of cells from the manifests of their stages."""

    def __init__(self, plan: Plan, store: Store, outcome: Outcome, out: Path) -> None:
        self._plan, self._store, self._outcome, self._out = plan, store, outcome, out
        self._victims: dict[str, Json] = {}
        self._round: tuple[str, int] | None = None
        self._plain = cache(plain)
        suite = plan.suite
        self._defenses = {choice.name: player(choice) for choice in suite.defenses}
        self._attacks = {choice.name: player(choice) for choice in (*suite.attacks, *suite.baselines)}
        self._protocol = {
            "victim_recipe": plain(suite.victim_recipe),
            "robustness": plain(suite.robustness),
            "numerics": plain(plan.numerics),
        }
        self._recipes = {student: plain(recipe) for student, recipe in suite.student_recipes.items()}
        self._classes = int(store.manifest(data_stage(suite.dataset).key)["metrics"]["classes"])

    def cell(self, planned: PlannedCell) -> Cell:
        """The record of one cell."""
        status, reason = self._status(planned)
        stages = planned.stages
        found = self._manifests(planned, stages) if status in (Status.DONE, Status.BYPASSED) else {}
        suite = self._plan.suite
        cell = Cell(
            suite=suite.name,
            dataset=suite.dataset.name,
            dataset_digest=self._plan.data_digest,
            classes=self._classes,
            victim=suite.victim,
            student=planned.student,
            defense=self._defenses[planned.defense.name] if planned.defense else None,
            attack=self._attacks[planned.attack.name],
            adaptive=planned.attack.instance.adaptive,
            seed=planned.seed,
            scenario=self._plain(planned.scenario),
            subset=self._plain(planned.subset),
            tolerance=suite.tolerance,
            status=status,
            reason=reason,
            metrics=_metrics(found),
            seconds={role: round(manifest["seconds"], 3) for role, manifest in found.items()},
            keys=stages,
            protocol={**self._protocol, "student_recipe": self._recipes[planned.student]},
            machine=found["evaluate"]["machine"] if found else {},
            reported=self._reported(planned),
            stateful=bool(planned.defense and planned.defense.instance.stateful),
        )
        return replace(cell, pictures=self._copy_pictures(cell, found["steal"])) if found else cell

    def _status(self, planned: PlannedCell) -> tuple[Status, str]:
        problems = [self._outcome.problems[key] for key in planned.keys if key in self._outcome.problems]
        if planned.skipped:
            return Status.SKIPPED, planned.skipped
        if problems:
            return Status.FAILED, problems[0]
        if planned.bypassed:
            return Status.BYPASSED, "the defense acts only when answering; the attacker has the weights"
        return Status.DONE, ""

    def _reported(self, planned: PlannedCell) -> list[ReportedNumber]:
        if not planned.defense and planned.subset != DataSubset():
            return []  # papers train their baselines on all the data
        defense = planned.defense.name if planned.defense else ""
        suite, attack, student = self._plan.suite, planned.attack.name, planned.student
        said = (figure.of(defense, attack, student, suite.victim) for figure in suite.reported)
        return [words for words in said if words]

    def _manifests(self, planned: PlannedCell, stages: Mapping[str, str]) -> dict[str, Json]:
        """The manifests of a cell by role. Those of a victim are kept for the cells of the same round, and no longer."""
        if self._round != (planned.student, planned.seed):
            self._round = planned.student, planned.seed
            self._victims.clear()
        return {role: self._manifest(key, role in ("steal", "evaluate")) for role, key in stages.items()}

    def _manifest(self, key: str, once: bool) -> Json:
        if once:
            return self._store.manifest(key)
        if key not in self._victims:
            self._victims[key] = self._store.manifest(key)
        return self._victims[key]

    def _copy_pictures(self, cell: Cell, attack_run: Json) -> list[str]:
        if cell.seed != self._plan.suite.seeds[0]:
            return []
        copies = []
        for name in attack_run["pictures"]:
            copy = Path(PICTURES) / f"{cell.name}--{name}"
            (self._out / PICTURES).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._store.path(cell.keys["steal"]) / name, self._out / copy)
            copies.append(copy.as_posix())
        return copies


def _metrics(found: Mapping[str, Json]) -> dict[str, float]:
    """The referee's numbers and the query count; what methods wrote down carries the name of its stage."""
    numbers: dict[str, float] = {}
    for role in ("train", "harden", "auxiliary", "steal"):
        if role in found and not (role == "harden" and found[role]["kind"] == "train"):
            numbers |= {f"{role}.{name}": value for name, value in found[role]["metrics"].items()}
    if "steal.queries" in numbers:
        numbers["queries"] = numbers.pop("steal.queries")
    for role in ("evaluate_victim", "evaluate"):
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
    strangers = {path.name for path in (out / FOLDER).glob("*.json")}
    strangers.difference_update(f"{cell.name}.json" for cell in plan.cells)
    if strangers:
        raise KdbenchError(
            f"{out} holds {len(strangers)} cells of another matrix ({min(strangers)}, ...). "
            "Choose another folder with --out, or remove it."
        )


def read_plan_file(folder: Path) -> PlanFile:
    """What the run that writes to `folder` said that it would do. Raises `KdbenchError` where nobody can tell."""
    if not (folder / PLAN).is_file():
        raise KdbenchError(f"{folder} is not the results folder of a run: it has no {PLAN}.")
    try:
        plan = read_json(folder / PLAN)
        stages = {str(stage["key"]): str(stage["title"]) for stage in plan["stages"]}
        return PlanFile(folder / plan["store"], stages, len(plan["cells"]))
    except (ValueError, KeyError, TypeError):
        raise KdbenchError(
            f"{folder / PLAN} is damaged; `kdbench run` with `--out {folder}` writes it again, and repeats nothing."
        ) from None


def _announce_plan(plan: Plan, store: Store, out: Path) -> None:
    """Make the results folder, and say in it what it is to hold. Raises `KdbenchError` where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_plan(plan, store, out)
    except OSError as error:
        raise KdbenchError(
            f"The results folder {out} cannot be used: {error.strerror}. Choose another with --out."
        ) from None


def _write_plan(plan: Plan, store: Store, out: Path) -> None:
    """Say what this folder is to hold, for `kdbench status`; piece by piece, for plans may be long."""
    with replacing(out / PLAN) as file:
        file.write(f'{{"store": {json.dumps(os.path.relpath(store.root, out))},\n "stages": [')
        for number, stage in enumerate(plan.stages.values()):
            file.write((",\n  " if number else "\n  ") + json.dumps({"key": stage.key, "title": stage.title}))
        file.write('],\n "cells": [')
        for number, cell in enumerate(plan.cells):
            file.write((",\n  " if number else "\n  ") + json.dumps(cell.name))
        file.write("]}\n")
