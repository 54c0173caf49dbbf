"""Cells -> stages: which stages a suite needs, each once, and which of them each cell is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from kdbench import registry
from kdbench.engine.sources import engine_digest, source_digest
from kdbench.engine.specs import (
    AttackSpec,
    AuxiliarySpec,
    CodeSpec,
    DataRef,
    DataSpec,
    EvaluateSpec,
    EvaluationSpec,
    HardenSpec,
    Keys,
    MethodSpec,
    NetworkSpec,
    Numerics,
    RunSpec,
    StageSpec,
    StealSpec,
    StudentSpec,
    SurrogateSpec,
    TrainingSpec,
    TrainSpec,
    VictimSpec,
    stage_key,
)
from kdbench.game.data import DataSubset
from kdbench.game.fields import plain
from kdbench.game.methods import Attack, acts_on_answers, hardens, has_auxiliary
from kdbench.game.threat import Access, Scenario
from kdbench.records import cell_name
from kdbench.suites.suite import Choice, Suite

STAGES_OF_CELL = (
    "train",
    "harden",
    "auxiliary",
    "steal",
    "evaluate",
    "evaluate_victim",
)  # in the order in which they can fail
VICTIM = "trained"  # the kind of victim of all suites so far


@dataclass(frozen=True, slots=True)
class Stage:
    """A unit of computation. Its key says all that its result depends on; `title` is for people, and unique in a plan."""

    spec: StageSpec
    title: str
    key: str

    @classmethod
    def of(cls, spec: StageSpec, title: str) -> "Stage":
        """The stage of this specification."""
        return cls(spec, title, stage_key(spec))

    @property
    def kind(self) -> str:
        """What kind of stage it is."""
        return self.spec.kind

    @property
    def inputs(self) -> Keys:
        """The stages it builds on."""
        return self.spec.inputs

    @property
    def fusible_group(self) -> str:
        """Equal for attack runs whose students may be trained together: the same network and recipe. "" for all others.

        Hardening is not fused: its loss may query the hardened model itself, whose weights lie elsewhere within an epoch.
        """
        return self.spec.training.digest if isinstance(self.spec, StealSpec) else ""


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """One defense against one attack by one student with one seed, and the stages it is made of; or why it is skipped.

    keys: of its stages, in the order of `STAGES_OF_CELL`, "" where it has none.
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
        """The keys of its stages by name; none when it is skipped."""
        return {name: key for name, key in zip(STAGES_OF_CELL, self.keys, strict=False) if key}

    @property
    def name(self) -> str:
        """Its name in the results."""
        defense = self.defense.name if self.defense else None
        return cell_name(defense, self.attack.name, self.student, self.seed, self.subset.fraction, self.subset.seed)


@dataclass
class Plan:
    """All stages of a suite, each after those it builds on, and all cells."""

    suite: Suite
    numerics: Numerics
    data_digest: str
    stages: dict[str, Stage] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)

    def add(self, spec: StageSpec, title: str) -> str:
        """Put a stage into the plan, once; its key."""
        stage = Stage.of(spec, title)
        return self.stages.setdefault(stage.key, stage).key


def data_stage(dataset: Choice) -> Stage:
    """The stage that decodes a data set: it must be done before the rest can be planned."""
    return Stage.of(DataSpec(_method(dataset), dataset.files), f"read {dataset.name}")


def make_plan(suite: Suite, numerics: Numerics, data_digest: str, surrogates: Mapping[str, str] | None = None) -> Plan:
    """The plan of `suite` on the data set with that digest; surrogates: the digests of the surrogate data, by name."""
    plan = Plan(suite, numerics, data_digest)
    shared = _Shared(plan, surrogates or {})
    for student in suite.students:
        for seed in suite.seeds:
            plan.cells.extend(_SeedCells(shared, student, seed).cells())
    return plan


@dataclass(frozen=True)
class _PlannedAttack:
    """An attack, or a baseline on one subset of the data, as all cells that run it have it."""

    choice: Choice
    scenario: Scenario
    subset: DataSubset
    spec: AttackSpec
    skipped: str = ""


@dataclass(frozen=True)
class _Service:
    """The victim behind a defense with one seed: the key of its training, and how it is served."""

    train: str
    victim: VictimSpec

    @property
    def keys(self) -> Keys:
        """Its stages, as a cell lists them."""
        return self.train, self.victim.key, self.victim.auxiliary


class _Shared:
    """What all cells of a plan share: the parts of specifications that depend on neither seed nor student."""

    def __init__(self, plan: Plan, surrogates: Mapping[str, str]) -> None:
        self.plan, self.suite = plan, plan.suite
        suite = self.suite
        self.run = RunSpec(self._data(suite.dataset, plan.data_digest), plan.numerics, engine_digest(judging=False))
        self.evaluation = EvaluationSpec(suite.robustness, engine_digest(judging=True))
        self.surrogates = {
            choice.name: SurrogateSpec(choice.name, self._data(choice, surrogates[choice.name]))
            for choice in suite.surrogates
        }
        self.victim = MethodSpec(VICTIM, {}, source_digest(registry.load("victim", VICTIM)))
        self.training = TrainingSpec(network(suite.victim), suite.victim_recipe)
        self.defenses = {choice.name: _method(choice) for choice in suite.defenses}
        self.defense_training = {
            choice.name: TrainingSpec(self.training.network, choice.recipe) if choice.recipe else self.training
            for choice in suite.defenses
        }
        self.student_training = {
            name: TrainingSpec(network(name), recipe) for name, recipe in suite.student_recipes.items()
        }
        methods = {choice.name: choice for choice in (*suite.baselines, *suite.attacks)}.values()
        self.attacks = [self._attack(choice) for choice in methods if choice.instance.needs > Access.NOTHING]
        self.baselines = list(self._baselines([m for m in methods if m.instance.needs is Access.NOTHING]))

    def _data(self, dataset: Choice, content: str) -> DataRef:
        stage = data_stage(dataset)
        self.plan.stages[stage.key] = stage
        return DataRef(stage.key, content)

    def _attack(self, attack: Choice) -> _PlannedAttack:
        scenario, subset = grant(self.suite.scenario, attack.instance), attack.instance.data_subset()
        skipped = ""
        if attack.instance.needs > scenario.access:
            needs, granted = attack.instance.needs.name.lower(), scenario.access.name.lower()
            skipped = f"'{attack.name}' needs {needs}; the suite grants {granted}"
        elif subset.fraction and not scenario.data:
            skipped = f"'{attack.name}' needs images of its own; the suite grants none"
        return _PlannedAttack(attack, scenario, subset, self._spec(attack, scenario, subset), skipped)

    def _baselines(self, choices: list[Choice]) -> Iterator[_PlannedAttack]:
        used = (DataSubset(), *(attack.subset for attack in self.attacks))
        subsets = dict.fromkeys(subset for subset in used if subset.fraction and self.suite.scenario.data)
        for choice in choices:
            scenario = grant(replace(self.suite.scenario, access=Access.NOTHING, budget=None), choice.instance)
            for subset in subsets:
                yield _PlannedAttack(choice, scenario, subset, self._spec(choice, scenario, subset))

    def _spec(self, choice: Choice, scenario: Scenario, subset: DataSubset) -> AttackSpec:
        attack: Attack = choice.instance
        return AttackSpec(
            _method(choice),
            replace(scenario, name=Scenario.name),  # what a scenario is called decides nothing
            subset,
            tuple(map(network, attack.networks())),
            tuple(CodeSpec(name, _source("defense", name)) for name in attack.simulated_defenses()),
            tuple(self.surrogates[name] for name in attack.surrogate_datasets()),
        )


class _SeedCells:
    """All cells of one student and one seed."""

    def __init__(self, shared: _Shared, student: str, seed: int) -> None:
        self._shared, self._suite, self._add = shared, shared.suite, shared.plan.add
        self._student, self._seed = student, seed
        self._training = shared.student_training[student]
        self._by = f" by {student}" if len(self._suite.students) > 1 else ""
        self._services: dict[str, _Service] = {}
        self._evaluated: dict[str, str] = {}

    def cells(self) -> Iterator[PlannedCell]:
        """One after another, their stages put into the plan."""
        for attack in self._shared.attacks:
            for defense in self._suite.defenses:
                yield self._cell(defense, attack)
        for baseline in self._shared.baselines:
            title = f"{baseline.choice.name} on {_described(baseline.subset)}{self._by}"
            yield self._planned(None, baseline, ("", "", "", *self._attack_run(baseline, None, title, title)))

    def _cell(self, defense: Choice, attack: _PlannedAttack) -> PlannedCell:
        if attack.skipped:
            return self._planned(defense, attack, ())
        name, service = attack.choice.name, self._service(defense)
        titles = f"{name} from {defense.name}{self._by}", f"{name} on {defense.name}{self._by}"
        attack_run = self._attack_run(attack, service.victim, *titles)
        return self._planned(defense, attack, (*service.keys, *attack_run, self._evaluate_victim(defense, service)))

    def _planned(self, defense: Choice | None, attack: _PlannedAttack, keys: Keys) -> PlannedCell:
        has_weights = bool(keys) and attack.scenario.access is Access.WEIGHTS
        bypassed = has_weights and defense is not None and _acts_on_answers_only(defense)
        return PlannedCell(
            self._seed,
            self._student,
            defense,
            attack.choice,
            attack.subset,
            attack.scenario,
            keys,
            attack.skipped,
            bypassed,
        )

    def _attack_run(self, attack: _PlannedAttack, victim: VictimSpec | None, title: str, evaluated: str) -> Keys:
        """The keys of an attack run against `victim`, and of the evaluation of its student."""
        steal = StealSpec(self._shared.run, victim, attack.spec, self._training, self._seed)
        key = self._add(steal, f"{title}, seed {self._seed}")
        return key, self._evaluate(victim, StudentSpec(key, self._training.network), evaluated)

    def _evaluate_victim(self, defense: Choice, service: _Service) -> str:
        if defense.name not in self._evaluated:
            self._evaluated[defense.name] = self._evaluate(service.victim, None, defense.name)
        return self._evaluated[defense.name]

    def _evaluate(self, victim: VictimSpec | None, student: StudentSpec | None, title: str) -> str:
        spec = EvaluateSpec(self._shared.run, self._shared.evaluation, victim, student, self._seed)
        return self._add(spec, f"evaluate {title}, seed {self._seed}")

    def _service(self, defense: Choice) -> _Service:
        if defense.name not in self._services:
            self._services[defense.name] = self._make_service(defense)
        return self._services[defense.name]

    def _make_service(self, defense: Choice) -> _Service:
        shared, seed = self._shared, self._seed
        train = self._add(TrainSpec(shared.run, shared.victim, shared.training, seed), f"train the victim, seed {seed}")
        key, auxiliary = train, ""
        parts = shared.defenses[defense.name], shared.defense_training[defense.name], seed
        if hardens(defense.instance):
            key = self._add(HardenSpec(shared.run, train, *parts), f"harden by {defense.name}, seed {seed}")
        if has_auxiliary(defense.instance):
            title = f"auxiliary model of {defense.name}, seed {seed}"
            auxiliary = self._add(AuxiliarySpec(shared.run, key, *parts), title)
        acting = shared.defenses[defense.name] if acts_on_answers(defense.instance) else None
        return _Service(train, VictimSpec(shared.victim, key, auxiliary, acting, shared.training, seed))


def _described(subset: DataSubset) -> str:
    """A subset of the attacker's data, in words."""
    return f"{100 * subset.fraction:g}% of the data" + (f" (choice {subset.seed})" if subset.seed else "")


def grant(scenario: Scenario, attack: Attack) -> Scenario:
    """What this attack is granted: the weights only if it needs them, everything below as the suite says.

    What has no effect is as it is by default, so that it makes no other key: `topk` at any other access level.
    """
    if scenario.access is Access.WEIGHTS and attack.needs < Access.WEIGHTS:
        scenario = replace(scenario, access=Access.PROBS)
    return scenario if scenario.access is Access.TOPK else replace(scenario, topk=Scenario.topk)


def _acts_on_answers_only(defense: Choice) -> bool:
    """Whether it acts only when answering: then an attacker with the weights does not meet it."""
    return acts_on_answers(defense.instance) and not hardens(defense.instance)


@cache
def network(name: str) -> NetworkSpec:
    """An architecture by its registered name."""
    return NetworkSpec(name, _source("model", name))


def _method(choice: Choice) -> MethodSpec:
    return MethodSpec(choice.method, plain(choice.fields), source_digest(type(choice.instance)))


def _source(kind: str, name: str) -> str:
    return source_digest(registry.load(kind, name))
