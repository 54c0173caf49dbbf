"""Cells -> stages: which pieces of work a suite needs, each once, and which of them each cell is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from kdbench import registry
from kdbench.board.results import Player, cell_name
from kdbench.game.data import Owned
from kdbench.game.fields import plain
from kdbench.game.methods import Attack, Defense, Precision
from kdbench.game.threat import Answers, ThreatModel
from kdbench.runner.sources import engine_digest, source_digest
from kdbench.runner.store import digest
from kdbench.runner.suite import Choice, Suite

SCHEMA = 1
Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Numerics:
    """What the arithmetic depends on; part of every key. threads: of one worker, whatever the number of workers."""

    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int = 1


@dataclass(frozen=True)
class Stage:
    """A piece of work. Its key says all that its result depends on; `label` is for people."""

    kind: str
    spec: Spec
    inputs: tuple[str, ...]
    label: str

    @cached_property
    def key(self) -> str:
        """<kind>/<digest of the specification>."""
        return f"{self.kind}/{digest({'schema': SCHEMA, 'kind': self.kind, 'spec': self.spec})}"


@dataclass(frozen=True)
class PlannedCell:
    """One defense against one attack by one student with one seed, and the stages it is made of; or why it is skipped."""

    seed: int
    student: str
    defense: Choice | None
    attack: Choice
    owned: Owned
    threat: ThreatModel
    stages: Mapping[str, str]
    skipped: str = ""
    bypassed: bool = False

    @property
    def name(self) -> str:
        """The name of its result file."""
        defense = self.defense.label if self.defense else None
        return cell_name(defense, self.attack.label, self.student, self.seed, self.owned.fraction, self.owned.seed)


@dataclass
class Plan:
    """All stages of a suite, each after those it builds on, and all cells."""

    suite: Suite
    numerics: Numerics
    data_digest: str
    stages: dict[str, Stage] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)

    def add(self, stage: Stage) -> str:
        """Put a stage into the plan, once; its key."""
        self.stages.setdefault(stage.key, stage)
        return stage.key


def data_stage(suite: Suite) -> Stage:
    """The stage that decodes the suite's data set: the one that must be done before the rest can be planned."""
    spec = {"dataset": _method(suite.dataset), "numerics": Numerics()}  # tensors, whatever the run's arithmetic
    return Stage("data", plain(spec), (), f"read {suite.dataset.label}")


def make_plan(suite: Suite, numerics: Numerics, data_digest: str) -> Plan:
    """The plan of `suite` on the data set with that digest."""
    plan = Plan(suite, numerics, data_digest)
    planner = _Planner(plan, plan.add(data_stage(suite)))
    for student in suite.students:
        for seed in suite.seeds:
            plan.cells.extend(planner.round(student, seed))
    return plan


class _Planner:
    """Adds the stages of one cell after another to the plan."""

    def __init__(self, plan: Plan, data: str) -> None:
        self._plan, self._suite, self._data = plan, plan.suite, data
        self._common = {
            "data": {"key": data, "digest": plan.data_digest},
            "numerics": plain(plan.numerics),
            "engine": engine_digest(judging=False),
        }
        self._evasion = plain(self._suite.evasion)

    def round(self, student: str, seed: int) -> Iterator[PlannedCell]:
        """All cells of one student and one seed."""
        players = {choice.label: choice for choice in (*self._suite.baselines, *self._suite.attacks)}.values()
        attacks = [choice for choice in players if choice.instance.needs > Answers.NOTHING]
        for attack in attacks:
            for defense in self._suite.defenses:
                yield self._cell(student, seed, defense, attack)
        used = (Owned(), *(attack.instance.owned() for attack in attacks))
        parts = dict.fromkeys(part for part in used if part.fraction and self._suite.threat.data)
        for baseline in (choice for choice in players if choice.instance.needs is Answers.NOTHING):
            for owned in parts:
                yield self._baseline(student, seed, baseline, owned)

    def _cell(self, student: str, seed: int, defense: Choice, attack: Choice) -> PlannedCell:
        threat = grant(self._suite.threat, attack.instance)
        cell = PlannedCell(seed, student, defense, attack, attack.instance.owned(), threat, {})
        if attack.instance.needs > threat.answers:
            needs, granted = attack.instance.needs.name.lower(), threat.answers.name.lower()
            return replace(cell, skipped=f"'{attack.label}' needs {needs}; the suite grants {granted}")
        if cell.owned.fraction and not threat.data:
            return replace(cell, skipped=f"'{attack.label}' needs images of its own; the suite grants none")
        victim = self._service(seed, defense)
        steal = self._steal(student, seed, attack, threat, cell.owned, victim, f" from {defense.label}")
        stages = {
            "train": self._train(seed),
            "harden": victim["key"],
            "steal": steal,
            "score": self._score(seed, victim, student, steal, f"{attack.label} on {defense.label}"),
            "audit": self._score(seed, victim, None, None, defense.label),
        }
        bypassed = threat.answers is Answers.WEIGHTS and serves_only(defense.instance)
        return replace(cell, stages=stages, bypassed=bypassed)

    def _baseline(self, student: str, seed: int, baseline: Choice, owned: Owned) -> PlannedCell:
        threat = replace(self._suite.threat, answers=Answers.NOTHING, budget=None)
        steal = self._steal(student, seed, baseline, threat, owned, None, f" on {owned.fraction:.0%} of the data")
        stages = {"steal": steal, "score": self._score(seed, None, student, steal, baseline.label)}
        return PlannedCell(seed, student, None, baseline, owned, threat, stages)

    def _train(self, seed: int) -> str:
        spec = {"network": network(self._suite.victim), "recipe": plain(self._suite.victim_recipe), "seed": seed}
        return self._add("train", spec, (self._data,), f"train the victim, seed {seed}")

    def _service(self, seed: int, defense: Choice) -> Spec:
        """What names a service: the hardened model, and the defense if it acts when answering."""
        victim = self._train(seed)
        key = victim if not hardens(defense.instance) else self._harden(seed, defense, victim)
        serving = _method(defense) if serves(defense.instance) else None
        recipe = plain(self._suite.victim_recipe)
        return {"key": key, "network": network(self._suite.victim), "defense": serving, "recipe": recipe, "seed": seed}

    def _harden(self, seed: int, defense: Choice, victim: str) -> str:
        spec = {
            "defense": _method(defense),
            "victim": victim,
            "network": network(self._suite.victim),
            "recipe": plain(defense.recipe or self._suite.victim_recipe),
            "seed": seed,
        }
        return self._add("harden", spec, (self._data, victim), f"harden by {defense.label}, seed {seed}")

    def _steal(
        self, student: str, seed: int, attack: Choice, threat: ThreatModel, owned: Owned, victim: Spec | None, whom: str
    ) -> str:
        spec = {
            "attack": _method(attack),
            "threat": plain(threat),
            "owned": plain(owned),
            "victim": victim,
            "network": network(student),
            "networks": {name: network(name) for name in attack.instance.networks()},
            "recipe": plain(self._suite.student_recipe),
            "seed": seed,
        }
        inputs = (self._data, *((victim["key"],) if victim else ()))
        return self._add("steal", spec, inputs, f"{attack.label}{whom}, seed {seed}")

    def _score(self, seed: int, victim: Spec | None, student: str | None, steal: str | None, whom: str) -> str:
        thief = {"key": steal, "network": network(student), "seed": seed} if student else None
        spec = {
            "victim": victim,
            "student": thief,
            "evasion": self._evasion,
            "seed": seed,
            "judges": engine_digest(judging=True),
        }
        inputs = (self._data, *((victim["key"],) if victim else ()), *((steal,) if steal else ()))
        return self._add("score", spec, inputs, f"score {whom}, seed {seed}")

    def _add(self, kind: str, spec: Spec, inputs: tuple[str, ...], label: str) -> str:
        return self._plan.add(Stage(kind, {**self._common, **spec}, inputs, label))


def grant(threat: ThreatModel, attack: Attack) -> ThreatModel:
    """What this attack is granted: the weights only if it needs them, everything below as the suite says."""
    if threat.answers is Answers.WEIGHTS and attack.needs < Answers.WEIGHTS:
        return replace(threat, answers=Answers.PROBS)
    return threat


def hardens(defense: Defense) -> bool:
    """Whether it makes a model of its own; otherwise its stage is the victim's."""
    return type(defense).harden is not Defense.harden


def serves(defense: Defense) -> bool:
    """Whether it acts when answering."""
    return type(defense).serve is not Defense.serve


def serves_only(defense: Defense) -> bool:
    """Whether it acts only when answering: then an attacker with the weights does not meet it."""
    return serves(defense) and not hardens(defense)


def player(choice: Choice) -> Player:
    """The record of a method in a cell."""
    return Player(choice.label, choice.method, choice.fields, choice.origin, plain(choice.recipe))


@cache
def network(name: str) -> Spec:
    """What names an architecture: its registered name and its source."""
    return {"name": name, "source": source_digest(registry.load("model", name))}


def _method(choice: Choice) -> Spec:
    return {"method": choice.method, "fields": choice.fields, "source": source_digest(type(choice.instance))}
