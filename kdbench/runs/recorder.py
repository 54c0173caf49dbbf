"""The recorder: makes the records of a results folder from the manifests of finished stages."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from kdbench.engine.plan import Plan, PlannedCell
from kdbench.engine.planner import data_stage
from kdbench.engine.scheduler import Outcome
from kdbench.engine.stages import PREDICTIONS
from kdbench.engine.store import Store
from kdbench.engine.workspace import TENSORS
from kdbench.game.data import DataSubset
from kdbench.game.fields import plain
from kdbench.game.threat import Scenario
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
    write_sorted,
)
from kdbench.runs import prediction_file
from kdbench.runs.manifests import Finished, Manifests, metrics, numbers
from kdbench.suites.suite import Choice

PICTURES = "pictures"
BYPASSED = "the defense acts only when answering; the attacker has the weights"
CellCounts = Counter[tuple[Status, str]]
"""How many cells ended how, and why."""


class Recorder:
    """Makes the records of a plan's cells from the manifests of their stages, and writes them to a results folder."""

    def __init__(self, plan: Plan, store: Store, outcome: Outcome, out: Path) -> None:
        self._plan, self._store, self._outcome, self._out = plan, store, outcome, out
        self._data = data_stage(plan.suite.dataset).key
        self._classes = int(store.manifest(self._data).numbers["classes"])
        self._manifests = Manifests(store)
        self._defenses = {choice.name: defense_record(choice) for choice in plan.suite.defenses}
        self._attacks = {choice.name: attack_record(choice) for choice in (*plan.suite.attacks, *plan.suite.baselines)}
        self._protocols = _protocols(plan)
        self._scenario = cache(_scenario_record)

    def record(self) -> CellCounts:
        """Write cells, pictures of the first seed, and predictions; how many cells ended how, and why."""
        counts: CellCounts = Counter()
        kept: dict[str, str] = {}  # name of predictions -> the stage that has them

        def counted() -> Iterator[Cell]:
            for planned in sorted(self._plan.cells, key=lambda planned: planned.name):
                cell = self.cell(planned)
                counts[cell.status, cell.reason] += 1
                if cell.status.scored:
                    kept.update(_predicted(cell))
                yield cell

        write_sorted(counted(), self._out)
        self._write_predictions(kept)
        return counts

    def cell(self, planned: PlannedCell) -> Cell:
        """The record of one cell."""
        status, reason = self._status(planned)
        stages = planned.stages
        defense = self._defenses[planned.defense.name] if planned.defense else None
        found = self._manifests.of_cell(defense.name if defense else None, stages) if status.scored else {}
        suite = self._plan.suite
        return Cell(
            suite=suite.name,
            dataset=suite.dataset.name,
            dataset_digest=self._plan.data_digest,
            classes=self._classes,
            victim=suite.victim,
            student=planned.student,
            defense=defense,
            attack=self._attacks[planned.attack.name],
            seed=planned.seed,
            scenario=self._scenario(planned.scenario),
            subset=SubsetRecord(planned.subset.fraction, planned.subset.seed),
            tolerance=suite.tolerance,
            status=status,
            reason=reason,
            metrics=metrics(found),
            numbers=numbers(found),
            seconds={stage: round(manifest.seconds, 3) for stage, manifest in found.items()},
            keys=stages,
            pictures=self._copy_pictures(planned, found["steal"]) if found else (),
            protocol=self._protocols[planned.student],
            machine=dict(found["evaluate"].machine) if found else {},
            reported=self._reported(planned),
        )

    def _status(self, planned: PlannedCell) -> tuple[Status, str]:
        problems = [self._outcome.problems[key] for key in planned.keys if key in self._outcome.problems]
        if planned.skipped:
            return Status.SKIPPED, planned.skipped
        if problems:
            return Status.FAILED, problems[0]
        return (Status.BYPASSED, BYPASSED) if planned.bypassed else (Status.DONE, "")

    def _reported(self, planned: PlannedCell) -> tuple[ReportedNumber, ...]:
        if not planned.defense and planned.subset != DataSubset():
            return ()  # papers train their baselines on all the data
        defense = planned.defense.name if planned.defense else ""
        suite, attack, student = self._plan.suite, planned.attack.name, planned.student
        said = (number.of(defense, attack, student, suite.victim) for number in suite.reported)
        return tuple(number for number in said if number)

    def _copy_pictures(self, planned: PlannedCell, attack_run: Finished) -> tuple[str, ...]:
        """The pictures of an attack run with the first seed, copied; their paths in the results folder."""
        if planned.seed != self._plan.suite.seeds[0] or not attack_run.pictures:
            return ()
        (self._out / PICTURES).mkdir(parents=True, exist_ok=True)
        copies = []
        for name in attack_run.pictures:
            copy = Path(PICTURES) / f"{planned.name}--{name}"
            shutil.copyfile(self._store.path(planned.stages["steal"]) / name, self._out / copy)
            copies.append(copy.as_posix())
        return tuple(copies)

    def _write_predictions(self, kept: Mapping[str, str]) -> None:
        """kept: the stage that has predictions, by their name in the results folder."""
        truth = prediction_file.read(self._store.path(self._data) / TENSORS, f"{prediction_file.TEST}.y")

        def file_of(name: str) -> Path:
            return self._store.path(kept[name]) / PREDICTIONS

        prediction_file.write(truth, self._classes, sorted(kept), file_of, self._out)


def _predicted(cell: Cell) -> Iterator[tuple[str, str]]:
    """The names of the predictions of a cell's networks, each with the stage that has them."""
    yield prediction_file.student_name(cell.name), cell.keys["evaluate"]
    if cell.defense:
        yield prediction_file.victim_name(cell.defense.name, cell.seed), cell.keys["evaluate_victim"]


def defense_record(choice: Choice) -> DefenseRecord:
    """The record of a defense of the suite."""
    recipe, defense = plain(choice.recipe), choice.instance
    said = {"stateful": defense.stateful, "is_reference": defense.is_reference}
    return DefenseRecord(choice.name, choice.method, choice.fields, choice.origin, recipe, **said)


def attack_record(choice: Choice) -> AttackRecord:
    """The record of an attack or a baseline of the suite."""
    attack = choice.instance
    said = {"adaptive": attack.adaptive, "labels_only": attack.labels_only}
    return AttackRecord(choice.name, choice.method, choice.fields, choice.origin, **said)


def _scenario_record(scenario: Scenario) -> ScenarioRecord:
    return ScenarioRecord(**{"name": "default"} | plain(scenario))


def _protocols(plan: Plan) -> dict[str, Protocol]:
    """The protocol under which each student is trained."""
    suite, numerics = plan.suite, plan.numerics
    arithmetic = NumericsRecord(numerics.device, numerics.precision, numerics.threads, numerics.compile, numerics.fuse)
    victim_recipe, robustness = plain(suite.victim_recipe), plain(suite.robustness)
    return {
        student: Protocol(victim_recipe, plain(recipe), robustness, arithmetic)
        for student, recipe in suite.student_recipes.items()
    }
