"""Cells -> stages: which pieces of work a suite needs, each once, and which of them each cell is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Protocol

from kdbench import registry
from kdbench.engine.sources import engine_digest, source_digest
from kdbench.engine.store import digest, json_digest
from kdbench.game.data import DataSubset
from kdbench.game.fields import plain
from kdbench.game.methods import Defense, Precision
from kdbench.game.threat import Access, Scenario
from kdbench.records import MethodRecord, cell_name
from kdbench.suites.scenarios import granted, refusal
from kdbench.suites.suite import Choice, Suite

SCHEMA = 2
ROLES = (
    "train",
    "harden",
    "auxiliary",
    "steal",
    "evaluate",
    "evaluate_victim",
)  # of a cell's stages, in the order in which they can fail
Spec = Mapping[str, Any]
Keys = tuple[str, ...]


@dataclass(frozen=True)
class Numerics:
    """What the arithmetic depends on; part of every key. threads: of one worker, whatever the number of workers.

    compile: whether networks are compiled. stack: how many thefts a worker does side by side at most, their students
    trained as one stack (1: each alone). Which ones is in no key: a student is that of its solo run up to rounding.
    """

    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int = 1
    compile: bool = False
    fuse: int = 1


class Part(Protocol):
    """Some fields of a specification, with the digest of each, and the stages that they name."""

    @property
    def fields(self) -> Spec: ...
    @property
    def digests(self) -> Mapping[str, str]: ...
    @property
    def inputs(self) -> Keys: ...


@dataclass(frozen=True)
class Shared:
    """A part of many stages' specifications: it is kept once and digested once."""

    fields: Spec
    inputs: Keys = ()

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """The digest of each field."""
        return {name: digest(value) for name, value in self.fields.items()}


@dataclass(frozen=True, slots=True)
class StudentPart:
    """The part of a score that names the student. No two scores share it, so it is put together when it is asked for."""

    key: str
    network: Spec
    seed: int

    @property
    def fields(self) -> Spec:
        """Which stage made the student, and what it is."""
        return {"student": {"key": self.key, "network": self.network, "seed": self.seed}}

    @property
    def digests(self) -> Mapping[str, str]:
        """The digest of that."""
        return {"student": json_digest(self.fields["student"])}

    @property
    def inputs(self) -> Keys:
        """The theft."""
        return (self.key,)


def stage_key(kind: str, digests: Mapping[str, str]) -> str:
    """<kind>/<digest of the digests of a specification's fields>: fields that many stages share are digested once."""
    return f"{kind}/{json_digest({'schema': SCHEMA, 'kind': kind, 'spec': digests})}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of work. Its key says all that its result depends on; `label` is for people, and unique in a plan."""

    kind: str
    parts: tuple[Part, ...]
    title: str
    key: str = field(init=False)

    def __post_init__(self) -> None:
        digests = {name: value for part in self.parts for name, value in part.digests.items()}
        object.__setattr__(self, "key", stage_key(self.kind, digests))

    @property
    def spec(self) -> Spec:
        """All that its result depends on, in clear."""
        return {name: value for part in self.parts for name, value in part.fields.items()}

    @property
    def fusible_group(self) -> Keys:
        """Equal for thefts whose students may be trained as one stack: the same network and recipe.

        Hardenings are none: their loss may ask the twin itself, whose weights a stack keeps elsewhere within an epoch.
        """
        named = ("network", "recipe") if self.kind == "steal" else ()
        return tuple(part.digests[name] for part in self.parts for name in named if name in part.digests)

    @property
    def inputs(self) -> Keys:
        """The stages it builds on."""
        return tuple(key for part in self.parts for key in part.inputs)


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """One defense against one attack by one student with one seed, and the stages it is made of; or why it is skipped.

    keys: of its stages, in the order of `ROLES`, "" where it has none.
    """

    seed: int
    student: str
    defense: Choice | None
    attack: Choice
    subset: DataSubset
    scenario: Scenario
    keys: Keys
    skipped: str = ""
    bypassed: bool = False

    @property
    def stages(self) -> dict[str, str]:
        """The keys of its stages by role; none when it is skipped."""
        return {role: key for role, key in zip(ROLES, self.keys, strict=False) if key}

    @property
    def name(self) -> str:
        """The name of its result file."""
        defense = self.defense.name if self.defense else None
        return cell_name(defense, self.attack.name, self.student, self.seed, self.subset.fraction, self.subset.seed)


@dataclass
class Plan:
    """All stages of a suite, each after those it builds on, and all cells."""

    suite: Suite
    numerics: Numerics
    data_digest: str
    surrogates: Mapping[str, str] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)

    def add(self, kind: str, parts: tuple[Part, ...], title: str) -> str:
        """Put a stage into the plan, once; its key."""
        stage = Stage(kind, parts, title)
        return self.stages.setdefault(stage.key, stage).key


def data_stage(dataset: Choice) -> Stage:
    """The stage that decodes a data set: it must be done before the rest can be planned."""
    spec = {"dataset": _method(dataset), "files": dataset.files}
    return Stage("data", (Shared({**plain(spec), "numerics": plain(Numerics())}),), f"read {dataset.name}")


def make_plan(suite: Suite, numerics: Numerics, data_digest: str, surrogates: Mapping[str, str] | None = None) -> Plan:
    """The plan of `suite` on the data set with that digest; `surrogates`: the digests of the public ones, by name."""
    plan = Plan(suite, numerics, data_digest, surrogates or {})
    planner = _Planner(plan)
    for student in suite.students:
        for seed in suite.seeds:
            plan.cells.extend(_SeedCells(planner, student, seed).cells())
    return plan


@dataclass(frozen=True)
class _PlannedAttack:
    """An attack, or a baseline on one part of the data, as all cells that play it have it."""

    choice: Choice
    scenario: Scenario
    subset: DataSubset
    part: Part
    skipped: str = ""


@dataclass(frozen=True)
class _Service:
    """The victim behind a defense with one seed: the stages it is made of, and the part that names it in others."""

    train: str
    key: str
    auxiliary: str
    part: Part

    @property
    def keys(self) -> Keys:
        """As they stand in a cell."""
        return self.train, self.key, self.auxiliary


NOBODY = Shared({"victim": None})
UNSTOLEN = Shared({"student": None})


class _Planner:
    """What all rounds of a plan share: the parts of specifications in which neither seed nor student stands."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.suite = plan, plan.suite
        data = data_stage(self.suite.dataset)
        plan.stages[data.key] = data
        self.surrogates = {choice.name: data_stage(choice) for choice in self.suite.surrogates}
        plan.stages |= {stage.key: stage for stage in self.surrogates.values()}
        common = {
            "data": {"key": data.key, "digest": plan.data_digest},
            "numerics": plain(plan.numerics),
            "engine": engine_digest(judging=False),
        }
        self.common = Shared(common, (data.key,))
        judging = {"robustness": plain(self.suite.robustness), "judges": engine_digest(judging=True)}
        self.judging = Shared({**common, **judging}, (data.key,))
        self.recipe = plain(self.suite.victim_recipe)
        self.training = Shared({"network": network(self.suite.victim), "recipe": self.recipe})
        self.hardening = {choice.name: self._hardening(choice) for choice in self.suite.defenses}
        self.auxiliaries = {choice.name: self._auxiliary_training(choice) for choice in self.suite.defenses}
        self.serving = {choice.name: self._serving(choice) for choice in self.suite.defenses}
        players = {choice.name: choice for choice in (*self.suite.baselines, *self.suite.attacks)}.values()
        self.attacks = [self._attack(choice) for choice in players if choice.instance.needs > Access.NOTHING]
        self.baselines = list(self._baselines([p for p in players if p.instance.needs is Access.NOTHING]))

    def _hardening(self, defense: Choice) -> Part | None:
        return self._training(defense) if hardens(defense.instance) else None

    def _auxiliary_training(self, defense: Choice) -> Part | None:
        return self._training(defense) if has_auxiliary(defense.instance) else None

    def _training(self, defense: Choice) -> Part:
        recipe = plain(defense.recipe or self.suite.victim_recipe)
        return Shared({"defense": _method(defense), "network": network(self.suite.victim), "recipe": recipe})

    def _serving(self, defense: Choice) -> Spec:
        serving = _method(defense) if serves(defense.instance) else None
        return {"network": network(self.suite.victim), "defense": serving, "recipe": self.recipe}

    def _attack(self, attack: Choice) -> _PlannedAttack:
        scenario, subset = granted(self.suite.scenario, attack.instance), attack.instance.data_subset()
        skipped = refusal(attack.name, attack.instance, scenario)
        return _PlannedAttack(attack, scenario, subset, self._attack_run(attack, scenario, subset), skipped)

    def _baselines(self, choices: list[Choice]) -> Iterator[_PlannedAttack]:
        used = (DataSubset(), *(attack.subset for attack in self.attacks))
        parts = dict.fromkeys(part for part in used if part.fraction and self.suite.scenario.data)
        for choice in choices:
            scenario = granted(replace(self.suite.scenario, access=Access.NOTHING, budget=None), choice.instance)
            for subset in parts:
                yield _PlannedAttack(choice, scenario, subset, self._attack_run(choice, scenario, subset))

    def _attack_run(self, attack: Choice, scenario: Scenario, subset: DataSubset) -> Part:
        networks = {name: network(name) for name in attack.instance.networks()}
        pools = {name: self.surrogates[name].key for name in attack.instance.surrogate_datasets()}
        surrogates = {name: {"key": key, "digest": self.plan.surrogates[name]} for name, key in pools.items()}
        fields = {"attack": _method(attack), "scenario": plain(scenario), "subset": plain(subset), "networks": networks}
        return Shared({**fields, "surrogates": surrogates}, tuple(pools.values()))


class _SeedCells:
    """All cells of one student and one seed."""

    def __init__(self, planner: _Planner, student: str, seed: int) -> None:
        self._planner, self._suite, self._add = planner, planner.suite, planner.plan.add
        self._student, self._seed = student, seed
        self._seeded = Shared({"seed": seed})
        self._attacker = Shared({"network": network(student), "recipe": plain(self._suite.student_recipes[student])})
        self._by = f" by {student}" if len(self._suite.students) > 1 else ""
        self._services: dict[str, _Service] = {}
        self._audits: dict[str, str] = {}

    def cells(self) -> Iterator[PlannedCell]:
        """One after another, their stages put into the plan."""
        for attack in self._planner.attacks:
            for defense in self._suite.defenses:
                yield self._cell(defense, attack)
        for baseline in self._planner.baselines:
            part = f"{baseline.choice.name} on {_named(baseline.subset)}{self._by}"
            yield self._planned(None, baseline, ("", "", "", *self._attack_run(baseline, NOBODY, part, part)))

    def _cell(self, defense: Choice, attack: _PlannedAttack) -> PlannedCell:
        if attack.skipped:
            return self._planned(defense, attack, ())
        label = attack.choice.name
        service = self._service(defense)
        stolen, judged = f"{label} from {defense.name}{self._by}", f"{label} on {defense.name}{self._by}"
        attack_runs = self._attack_run(attack, service.part, stolen, judged)
        return self._planned(defense, attack, (*service.keys, *attack_runs, self._audit(defense, service)))

    def _planned(self, defense: Choice | None, move: _PlannedAttack, keys: Keys) -> PlannedCell:
        armed = bool(keys) and move.scenario.access is Access.WEIGHTS
        bypassed = armed and defense is not None and serves_only(defense.instance)
        return PlannedCell(
            self._seed, self._student, defense, move.choice, move.subset, move.scenario, keys, move.skipped, bypassed
        )

    def _attack_run(self, move: _PlannedAttack, victim: Part, stolen: str, judged: str) -> Keys:
        """The stages of a theft from `victim` and of its score."""
        parts = (self._planner.common, victim, move.part, self._attacker, self._seeded)
        key = self._add("steal", parts, f"{stolen}, seed {self._seed}")
        student = StudentPart(key, network(self._student), self._seed)
        return key, self._score(victim, student, judged)

    def _score(self, victim: Part, student: Part, whom: str) -> str:
        parts = (self._planner.judging, victim, student, self._seeded)
        return self._add("evaluate", parts, f"score {whom}, seed {self._seed}")

    def _service(self, defense: Choice) -> _Service:
        if defense.name not in self._services:
            self._services[defense.name] = self._open(defense)
        return self._services[defense.name]

    def _open(self, defense: Choice) -> _Service:
        parts = (self._planner.common, self._planner.training, self._seeded)
        train = self._add("train", parts, f"train the victim, seed {self._seed}")
        key = self._harden(defense, train)
        auxiliary = self._auxiliary(defense, key)
        named = {"key": key, "auxiliary": auxiliary, "seed": self._seed, **self._planner.serving[defense.name]}
        inputs = (key, auxiliary) if auxiliary else (key,)
        return _Service(train, key, auxiliary, Shared({"victim": named}, inputs))

    def _audit(self, defense: Choice, service: _Service) -> str:
        if defense.name not in self._audits:
            self._audits[defense.name] = self._score(service.part, UNSTOLEN, defense.name)
        return self._audits[defense.name]

    def _harden(self, defense: Choice, victim: str) -> str:
        hardening = self._planner.hardening[defense.name]
        if not hardening:
            return victim
        parts = (self._planner.common, Shared({"victim": victim}, (victim,)), hardening, self._seeded)
        return self._add("harden", parts, f"harden by {defense.name}, seed {self._seed}")

    def _auxiliary(self, defense: Choice, model: str) -> str:
        """The stage of what the service needs beside the model; "" where that is nothing."""
        auxiliaries = self._planner.auxiliaries[defense.name]
        if not auxiliaries:
            return ""
        parts = (self._planner.common, Shared({"victim": model}, (model,)), auxiliaries, self._seeded)
        return self._add("auxiliary", parts, f"equip {defense.name}, seed {self._seed}")


def _named(subset: DataSubset) -> str:
    """A part of the thief's data, in words."""
    return f"{100 * subset.fraction:g}% of the data" + (f" (choice {subset.seed})" if subset.seed else "")


def hardens(defense: Defense) -> bool:
    """Whether it makes a model of its own; otherwise its stage is the victim's."""
    return type(defense).harden is not Defense.harden


def serves(defense: Defense) -> bool:
    """Whether it acts when answering."""
    return type(defense).serve is not Defense.serve


def has_auxiliary(defense: Defense) -> bool:
    """Whether it needs a second network to answer."""
    return type(defense).auxiliary is not Defense.auxiliary


def serves_only(defense: Defense) -> bool:
    """Whether it acts only when answering: then an attacker with the weights does not meet it."""
    return serves(defense) and not hardens(defense)


def player(choice: Choice) -> MethodRecord:
    """The record of a method in a cell."""
    return MethodRecord(choice.name, choice.method, choice.fields, choice.origin, plain(choice.recipe))


@cache
def network(name: str) -> Spec:
    """What names an architecture: its registered name and its source."""
    return {"name": name, "source": source_digest(registry.load("model", name))}


def _method(choice: Choice) -> Spec:
    return {"method": choice.method, "fields": choice.fields, "source": source_digest(type(choice.instance))}
