"""The contract suite: the laws of defenses and attacks. Authors run it on their own methods in one line.

    from kdbench.testing import check_defense
    def test_contract(): check_defense(Rounding(decimals=2))

Everything runs in seconds on a CPU, on made-up images. A broken law is a `BrokenContract` that names it.
"""

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench import registry
from kdbench.engine.tensors import load_state, save_state
from kdbench.errors import KdbenchError, Refused
from kdbench.game import methods
from kdbench.game.data import Split
from kdbench.game.fields import build, plain
from kdbench.game.methods import Attack, Checkpoint, Context, Defense, EngineHooks, Log, Recipe
from kdbench.game.roles import Role, derive, seeded
from kdbench.game.threat import Access, Oracle, QueryCounter, Scenario, Service
from kdbench.training.fit import fit, inference
from kdbench.zoo.datasets import Blobs

RECIPE = Recipe(epochs=2, batch=32, lr=0.05, crop=1)
NETWORK = "mini-8"
TOLERANCE = 1e-4  # of a sum of probabilities in float32
ASKED = 16  # images with which a service is checked
TRUNCATED = 2  # classes revealed to an attack that says it needs no more than the top ones


class BrokenContract(AssertionError):
    """A law that a method does not keep."""


def make_context(data: Split, role: Role, weights: Role = Role.STUDENT_WEIGHTS, seed: int = 0) -> Context:
    """A context on the CPU for one role of a cell, with a tiny network and a short recipe.

    weights: the role that draws the initial weights of `new_student`. Two contexts with equal arguments draw equally.
    """
    made = itertools.count()

    def new_student(name: str | None = None) -> nn.Module:
        with seeded(derive(seed, weights, next(made))):
            network: nn.Module = registry.load("model", name or NETWORK)(data.shape, data.classes)
            return network.to(memory_format=torch.channels_last)

    own = derive(seed, role)
    draws, engine = torch.Generator().manual_seed(own), EngineHooks(inference)
    return Context(data, RECIPE, "cpu", own, new_student, draws, Log(), engine=engine)


def check_defense(defense: Defense) -> None:
    """Check that `defense` keeps the laws of defenses; raises `BrokenContract` with the law that it breaks.

    It is a frozen dataclass with defaults that survives a trip through JSON. `harden` and `auxiliary` return networks of
    the victim's architecture and leave what they are given as it was. A service answers with normalised
    log-probabilities, the same ones when asked again or in other batches (unless declared stateful). Equal seeds give
    equal bits, and torch's global generator is left alone.
    """
    _check_value(defense, Defense)
    with _global_randomness_untouched("a defense"):
        hardened, service = _defend(defense, seed=0)
        again, repeated = _defend(defense, seed=0)
        answers, others = _check_service(service, defense.stateful), repeated(_images().x[:ASKED])
    rule = "for the same seed: draw from ctx.generator only"
    _require(_same(hardened, again), f"harden must give the same weights {rule}")
    _require(torch.equal(answers, others), f"serve must answer the same {rule}")
    _require(not defense.is_reference or not methods.acts_on_answers(defense), "a reference must not act on answers")


def check_attack(attack: Attack) -> None:
    """Check that `attack` keeps the laws of attacks; raises `BrokenContract` with the law that it breaks.

    It is a frozen dataclass with defaults that survives a trip through JSON, and works with just the access, networks and
    surrogate data that it declares. `steal` returns the network that it made first, so that all attacks start from the
    same weights. It asks through the oracle no more than the budget, and a baseline asks nothing. Equal seeds give equal
    bits, interrupted or not, and torch's global generator is left alone.
    """
    _check_value(attack, Attack)
    needs = getattr(type(attack), "needs", None)
    _require(isinstance(needs, Access), "an attack must say what it needs: needs: ClassVar[Access] = ...")
    with tempfile.TemporaryDirectory() as folder:
        with _global_randomness_untouched("an attack"):
            whole = _run(attack, AttackRun(Path(folder) / "whole"))
            again = _run(attack, AttackRun(Path(folder) / "again"))
        reproduced = _same(whole.student, again.student)
        _require(reproduced, "steal must give the same weights for the same seed: draw from ctx.generator only")
        if attack.needs is Access.NOTHING:
            _require(whole.served == 0, "an attack that needs nothing must ask nothing")
        elif whole.served > 1:
            _check_budget(attack, whole, Path(folder))
        _check_interruptions(attack, whole, Path(folder))


class AttackRun(Log):
    """One run of an attack: its log, checkpoints in `folder`, the images served, and the student.

    budget: of the oracle. stop: the number of the checkpoint at which the run is stopped; 0: never.
    """

    def __init__(self, folder: Path, budget: int | None = None, stop: int = 0) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        self.folder, self.budget, self.stop = folder, budget, stop
        self.counter = QueryCounter()
        self.served, self.saved = 0, 0
        self.generator: torch.Generator
        self.student: nn.Module

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint that is due at every chance."""
        return _File(self, self.folder / f"{name.replace('/', '-')}.safetensors")


class _Stopped(BaseException):
    """The run was stopped. Not an Exception: no method may swallow it."""


@dataclass(frozen=True)
class _File(Checkpoint):
    run: AttackRun
    path: Path

    def load(self) -> Any:
        kept = load_state(self.path)
        if kept is None:
            return None
        self.run.generator.set_state(kept["generator"])
        self.run.counter.answered = kept["answered"]
        self.run.numbers.update(kept["numbers"])
        return kept["state"]

    def due(self) -> bool:
        return True

    def save(self, state: Mapping[str, Any]) -> None:
        run = self.run
        kept = {"generator": run.generator.get_state(), "answered": run.counter.answered, "numbers": run.numbers}
        save_state({"state": state, **kept}, self.path)
        run.saved += 1
        if run.saved == run.stop:
            raise _Stopped


def _check_value(method: Defense | Attack, base: type) -> None:
    cls = type(method)
    _require(isinstance(method, base), f"the method must be a subclass of {base.__name__}")
    settings = vars(cls).get("__dataclass_params__")  # its own: an undecorated subclass has no fields of its own
    _require(settings is not None and settings.frozen, "the class must be a frozen dataclass")
    documented = bool(cls.__doc__) and not str(cls.__doc__).startswith(f"{cls.__name__}(")
    _require(documented, "the class must say in a docstring what it does")
    missing = dataclasses.MISSING
    required = [f for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]
    _require(not required, "every field must have a default")
    again = None
    with suppress(KdbenchError):
        again = build(cls, plain(method), "method")
    _require(again == method, "the fields must survive a trip through JSON")


def _check_service(service: Service, stateful: bool) -> Tensor:
    """The first answers of `service`, checked."""
    x = _images().x[:ASKED]
    log_p, size = service(x), (len(x), _images().classes)
    _require(log_p.shape == size, f"a service answers (N,K) = {size}, not {tuple(log_p.shape)}")
    valid = not log_p.isnan().any() and not (log_p == torch.inf).any()
    _require(valid, "answers must be log-probabilities: no NaN, no +inf")
    p = log_p.exp()
    _require(_close(p.sum(dim=1), torch.ones(len(x))), "the probabilities of an answer must sum to one")
    if not stateful:
        asked_again, unless = torch.equal(service(x), log_p), "unless stateful = True"
        _require(asked_again, f"a question asked again must get the same answer, {unless}")
        apart = torch.cat([service(part) for part in x.split(5)]).exp()
        _require(_close(apart, p), f"an answer must not depend on the other images of its batch, {unless}")
    return log_p


def _close(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() < TOLERANCE).all())


def _defend(defense: Defense, seed: int) -> tuple[nn.Module, Service]:
    def context(role: Role, weights: Role) -> Context:
        return make_context(_images(), role, weights, seed)

    ctx = context(Role.VICTIM_TRAINING, Role.VICTIM_WEIGHTS)
    victim = ctx.new_student()
    fit(victim, nn.functional.cross_entropy, ctx.data.x, ctx.data.y, ctx)
    before = copy.deepcopy(victim)
    hardened = defense.harden(victim, context(Role.HARDENING, Role.HARDENING_WEIGHTS))
    _require(_same(before, victim), "harden must leave the victim as it was")
    _require(_shapes(hardened) == _shapes(victim), "harden must return a network of the victim's architecture")
    deployed, kept = hardened.eval().requires_grad_(False), copy.deepcopy(hardened)
    auxiliary = methods.with_auxiliary(defense, deployed, context(Role.AUXILIARY, Role.AUXILIARY_WEIGHTS)).auxiliary
    if auxiliary is not None:
        _require(_shapes(auxiliary) == _shapes(victim), "auxiliary must return a network of the victim's architecture")
    serving = context(Role.EVALUATED_SERVICE, Role.EVALUATED_SERVICE_WEIGHTS)
    service = defense.serve(deployed, replace(serving, auxiliary=auxiliary))
    _require(_same(kept, hardened), "auxiliary and serve must leave the model as it was")
    return hardened, service


def _run(attack: Attack, run: AttackRun) -> AttackRun:
    """Run the attack at the access level that it says it needs."""
    victim, service = _defend(Defense(), seed=1)

    def counted(x: Tensor) -> Tensor:  # images are counted where they are served: an attack cannot reach this counter
        run.served += len(x)
        return service(x)

    scenario = Scenario(access=attack.needs, topk=TRUNCATED, budget=run.budget)
    ctx, made = _declared(attack, make_context(attack.data_subset().of(_images()), Role.ATTACK))
    run.generator = ctx.generator
    try:
        run.student = attack.steal(Oracle(counted, scenario, victim, run.counter), replace(ctx, log=run))
    except Refused as error:
        if run.budget is not None:
            raise
        law = f"an attack must work with what it says it needs ({attack.needs.name})"
        raise BrokenContract(f"{law}; it {error}") from None
    alike = _shapes(run.student) == _shapes(ctx.new_student())
    _require(alike, "steal must return a network as ctx.new_student() makes it")
    _require(run.student is made[0], "steal must return the network that it made first, with the weights of that start")
    return run


def _declared(attack: Attack, ctx: Context) -> tuple[Context, list[nn.Module]]:
    """The context with nothing but what `attack` declares, and the list of the networks it makes."""
    made: list[nn.Module] = []

    def new_student(name: str | None = None) -> nn.Module:
        _require(name is None or name in attack.networks(), f"networks() must name '{name}', for which steal asks")
        made.append(ctx.new_student(name))
        return made[-1]

    def surrogate(name: str) -> Tensor:
        _require(name in attack.surrogate_datasets(), f"surrogate_datasets() must name '{name}', for which steal asks")
        return Blobs(300, seed=9).load(Path()).train.x

    return replace(ctx, new_student=new_student, surrogate=surrogate), made


def _check_budget(attack: Attack, whole: AttackRun, folder: Path) -> None:
    """With a budget of what it asked it does the same; with one answer less it is refused, or asks less."""
    exact = _run(attack, AttackRun(folder / "exact", whole.served))
    _require(_same(exact.student, whole.student), "a budget that suffices must not change the student")
    short = AttackRun(folder / "short", whole.served - 1)
    with suppress(KdbenchError):
        _run(attack, short)
    _require(short.served <= whole.served - 1, "an attack gets no more answers than its budget")


def _check_interruptions(attack: Attack, whole: AttackRun, folder: Path) -> None:
    """Stopped at its first, a middle and its last checkpoint, it goes on to the same student."""
    for stop in sorted({1, (whole.saved + 1) // 2, whole.saved} - {0}) if whole.saved else ():
        parts = folder / f"parts-{stop}"
        with suppress(_Stopped):
            _run(attack, AttackRun(parts, stop=stop))
        resumed = _run(attack, AttackRun(parts))
        law = "an interrupted run must go on to the same"
        _require(_same(resumed.student, whole.student), f"{law} student: checkpoint what changes")
        _require(resumed.counter == whole.counter, f"{law} number of queries")
        _require(resumed.numbers == whole.numbers, f"{law} logged numbers")


def _images() -> Split:
    return Blobs().load(Path()).train


def _same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _require(kept: bool, law: str) -> None:
    if not kept:
        raise BrokenContract(law)


@contextmanager
def _global_randomness_untouched(who: str) -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    untouched = torch.equal(before, torch.get_rng_state())
    _require(untouched, f"{who} must not draw from torch's global generator; `seeded` wraps what does")
