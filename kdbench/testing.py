"""The contract suite: what every defense and every attack keeps. Authors run it on their own methods in one line.

    from kdbench.testing import check_defense
    def test_contract(): check_defense(Rounding(decimals=2))

Everything runs in seconds on a CPU, on made-up images. A broken law is a `BrokenContract` that names it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.engine.stages import ModelFactory
from kdbench.errors import KdbenchError, Refused
from kdbench.game.data import Split
from kdbench.game.fields import build, plain
from kdbench.game.methods import Attack, Context, Defense, Log, Recipe
from kdbench.game.roles import Role, derive
from kdbench.game.threat import Access, Oracle, QueryCounter, Scenario, Service
from kdbench.training.fit import fit
from kdbench.zoo.datasets import Blobs

RECIPE = Recipe(epochs=2, batch=32, lr=0.05, crop=1)
NETWORK = "mini-8"
TOLERANCE = 1e-4  # of a sum of probabilities in float32

State = dict[str, Tensor]


class BrokenContract(AssertionError):
    """A law that a method does not keep."""


def check_defense(defense: Defense) -> None:
    """Check that `defense` keeps the laws of defenses.

    It is a frozen dataclass with defaults that survives a trip through JSON; `harden` and `auxiliary` return networks
    of the victim's architecture and leave what they are given as it was; `serve` answers with normalised log-
    probabilities, the same ones when asked again (unless declared stateful); equal seeds give equal bits, and torch's
    global generator is left alone.
    """
    _check_value(defense, Defense)
    with _global_randomness_untouched("a defense"):
        hardened, service = _defend(defense, seed=0)
        again, repeated = _defend(defense, seed=0)
        answers, others = _check_service(service, defense.stateful), repeated(_questions())
    _require(
        _same(_state(hardened), _state(again)),
        "harden must give the same weights for the same seed: draw from ctx.generator only",
    )
    _require(torch.equal(answers, others), "serve must answer the same for the same seed: draw from ctx.generator only")


def check_attack(attack: Attack) -> None:
    """Check that `attack` keeps the laws of attacks.

    It is a frozen dataclass with defaults that survives a trip through JSON; `steal` returns a network of the student's
    architecture, asks through the oracle no more than the budget, works with just what it says it needs, and a baseline
    asks nothing; equal seeds give equal bits, and torch's global generator is left alone.
    """
    _check_value(attack, Attack)
    _require(
        isinstance(getattr(type(attack), "needs", None), Access),
        "an attack must say what it needs: needs: ClassVar[Answers] = ...",
    )
    with _global_randomness_untouched("an attack"):
        student, asked = _play(attack)
        again, _ = _play(attack)
    _require(
        _same(_state(student), _state(again)),
        "steal must give the same weights for the same seed: draw from ctx.generator only",
    )
    if attack.needs is Access.NOTHING:
        _require(asked == 0, "an attack that needs nothing must ask nothing")
    elif asked > 1:
        _check_budget(attack, asked // 2)


def _check_value(method: Defense | Attack, base: type) -> None:
    cls = type(method)
    _require(isinstance(method, base), f"the method must be a subclass of {base.__name__}")
    settings = vars(cls).get("__dataclass_params__")  # its own: an undecorated subclass has no fields of its own
    _require(settings is not None and settings.frozen, "the class must be a frozen dataclass")
    _require(
        bool(cls.__doc__) and not str(cls.__doc__).startswith(f"{cls.__name__}("),
        "the class must say in a docstring what it does",
    )
    _require(all(_has_default(field) for field in dataclasses.fields(cls)), "every field must have a default")
    _require(_reread(method) == method, "the fields must survive a trip through JSON")


def _has_default(field: "dataclasses.Field[object]") -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _reread(method: Defense | Attack) -> object:
    """The method as its own record makes it; None where it cannot be read."""
    try:
        return build(type(method), plain(method), "method")
    except KdbenchError:
        return None


def _check_service(service: Service, stateful: bool) -> Tensor:
    """The first answers of `service`, checked."""
    x, classes = _questions(), _images().classes
    log_p = service(x)
    _require(
        log_p.shape == (len(x), classes), f"a service answers (N,K) = {(len(x), classes)}, not {tuple(log_p.shape)}"
    )
    _require(
        not log_p.isnan().any() and not (log_p == torch.inf).any(), "answers must be log-probabilities: no NaN, no +inf"
    )
    total = log_p.exp().sum(dim=1)
    _require(bool(((total - 1).abs() < TOLERANCE).all()), "the probabilities of an answer must sum to one")
    if not stateful:
        _require(
            torch.equal(service(x), log_p), "a question asked again must get the same answer, unless stateful = True"
        )
    return log_p


def _questions() -> Tensor:
    return _images().x[:16]


def _play(attack: Attack) -> tuple[nn.Module, int]:
    """A theft without a budget, under the grant that the attack says it needs; the student, and the images answered."""
    served = QueryCounter()
    try:
        return _attack(attack, None, served), served.answered
    except Refused as error:
        raise BrokenContract(
            f"an attack must work with what it says it needs ({attack.needs.name}); it {error}"
        ) from None


def _check_budget(attack: Attack, budget: int) -> None:
    served = QueryCounter()
    with suppress(Refused):
        _attack(attack, budget, served)
    _require(served.answered <= budget, "an attack gets no more answers than its budget")


def _defend(defense: Defense, seed: int) -> tuple[nn.Module, Service]:
    factory, data = _factory(Role.VICTIM_WEIGHTS, seed), _images()
    victim = factory()
    fit(victim, nn.functional.cross_entropy, data.x, data.y, _context(data, factory, Role.VICTIM_TRAINING))
    before = _state(victim)
    hardened = defense.harden(victim, _context(data, factory, Role.HARDENING))
    _require(_same(before, _state(victim)), "harden must leave the victim as it was")
    _require(_shapes(hardened) == _shapes(victim), "harden must return a network of the victim's architecture")
    deployed, kept = hardened.eval().requires_grad_(False), _state(hardened)
    auxiliary = defense.auxiliary(deployed, _context(data, factory, Role.AUXILIARY))
    if auxiliary is not None:
        _require(_shapes(auxiliary) == _shapes(victim), "companion must return a network of the victim's architecture")
        auxiliary.eval().requires_grad_(False)
    ctx = replace(_context(data, factory, Role.EVALUATED_SERVICE), auxiliary=auxiliary)
    service = defense.serve(deployed, ctx)
    _require(_same(kept, _state(hardened)), "companion and serve must leave the model as it was")
    return hardened, service


def _attack(attack: Attack, budget: int | None, served: QueryCounter) -> nn.Module:
    """A theft; images are counted where they are served, so that an attack which meddles with the oracle is found out."""
    data = attack.data_subset().of(_images())
    victim, service = _defend(Defense(), seed=1)

    def counted(x: Tensor) -> Tensor:
        served.answered += len(x)
        return service(x)

    oracle = Oracle(counted, Scenario(access=attack.needs, budget=budget), victim)
    factory = ModelFactory(NETWORK, data, 0, Role.STUDENT_WEIGHTS, "cpu")
    student = attack.steal(oracle, _context(data, factory, Role.ATTACK))
    _require(_shapes(student) == _shapes(factory()), "steal must return a network as ctx.new_student() makes it")
    return student


def _images() -> Split:
    return Blobs().load(Path()).train


def _factory(role: Role, seed: int) -> ModelFactory:
    return ModelFactory(NETWORK, _images(), seed, role, "cpu")


def _context(data: Split, factory: ModelFactory, role: Role) -> Context:
    seed = derive(0, role)
    draws = torch.Generator().manual_seed(seed)
    return Context(
        data, RECIPE, "cpu", seed, factory, draws, Log(), surrogate=lambda _: Blobs(300, seed=9).load(Path()).train.x
    )


def _state(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _require(kept: bool, law: str) -> None:
    if not kept:
        raise BrokenContract(law)


@contextmanager
def _global_randomness_untouched(who: str) -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    _require(
        torch.equal(before, torch.get_rng_state()),
        f"{who} must not draw from torch's global generator; `seeded` wraps what does",
    )
