"""The planner: makes the plan of a suite."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from kdbench import registry
from kdbench.engine.numerics import Numerics
from kdbench.engine.parts import (
    AttackSpec,
    CodeSpec,
    DataRef,
    EvaluationSpec,
    Keys,
    MethodSpec,
    NetworkSpec,
    RunSpec,
    SurrogateSpec,
    TrainingSpec,
    VictimSpec,
)
from kdbench.engine.plan import Plan, PlannedCell, Stage
from kdbench.engine.sources import engine_digest, source_digest
from kdbench.engine.specs import AuxiliarySpec, DataSpec, EvaluateSpec, HardenSpec, StealSpec, StudentSpec, TrainSpec
from kdbench.game.data import DataSubset
from kdbench.game.fields import plain
from kdbench.game.methods import Attack, acts_on_answers, hardens, has_auxiliary
from kdbench.game.threat import Access, Scenario
from kdbench.suites.scenarios import granted, refusal
from kdbench.suites.suite import Choice, Suite

VICTIM = "trained"  # the kind of victim of all suites so far


def data_stage(dataset: Choice) -> Stage:
    """The stage that decodes a data set: it must be done before the rest can be planned."""
    return Stage.of(DataSpec(_method(dataset), dataset.files, engine_digest(DataSpec.kind)), f"read {dataset.name}")


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
        self.run = RunSpec(self._data(suite.dataset, plan.data_digest), plan.numerics, engine_digest(StealSpec.kind))
        self.evaluation = EvaluationSpec(suite.robustness, engine_digest(EvaluateSpec.kind))
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
        scenario, subset = granted(self.suite.scenario, attack.instance), attack.instance.data_subset()
        skipped = refusal(attack.name, attack.instance, scenario)
        return _PlannedAttack(attack, scenario, subset, self._spec(attack, scenario, subset), skipped)

    def _baselines(self, choices: list[Choice]) -> Iterator[_PlannedAttack]:
        used = (DataSubset(), *(attack.subset for attack in self.attacks))
        subsets = dict.fromkeys(subset for subset in used if subset.fraction and self.suite.scenario.data)
        for choice in choices:
            scenario = granted(replace(self.suite.scenario, access=Access.NOTHING, budget=None), choice.instance)
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
