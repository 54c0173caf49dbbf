"""The laws of defenses and attacks, over everything that is registered; and that the suite which holds them catches."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.error import URLError

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import blobs, context, playable
from kdbench import registry
from kdbench.api import (
    Access,
    Attack,
    Context,
    Dataset,
    DataSubset,
    Defense,
    Images,
    KdbenchError,
    Oracle,
    Refused,
    Scenario,
    Service,
    fit,
)
from kdbench.attacks.hard_label import HardLabel
from kdbench.attacks.kd import KD
from kdbench.game.fields import build
from kdbench.game.threat import QueryCounter
from kdbench.testing import BrokenContract, check_attack, check_defense

# Registered methods whose defaults are too slow for a test.
SMALL: dict[str, dict[str, Any]] = {
    "adversarial-sparse": {"iterations": 2},
    "deep-inversion": {"images": 32, "batch": 16, "iterations": 3, "steps": 2, "competition": 1.0},
    "denoise": {"examples": 256, "epochs": 5},
    "dfme": {"queries": 448, "batch": 16, "width": 4, "noise": 8},
    "knockoff": {"queries": 80, "batch": 32, "clusters": 6, "policy": "adaptive"},
}


def method(kind: str, name: str) -> Any:
    return build(registry.load(kind, name), SMALL.get(name, {}), f"{kind}.{name}")


# Everything registered


@pytest.mark.parametrize("name", registry.names("defense"))
def test_every_registered_defense_keeps_the_contract(name: str) -> None:
    check_defense(method("defense", name))


@pytest.mark.parametrize("name", registry.names("attack"))
def test_every_registered_attack_keeps_the_contract(name: str) -> None:
    check_attack(method("attack", name))


@pytest.mark.parametrize("name", playable("model"))
def test_every_registered_network_makes_logits_of_images(name: str) -> None:
    network = registry.load("model", name)((3, 32, 32), 10).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", playable("dataset"))
def test_every_registered_data_set_is_images_with_labels_or_says_where_it_looked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", unreachable)  # a test downloads nothing
    dataset: Dataset = registry.load("dataset", name)()
    try:
        images = dataset.load(tmp_path)
    except KdbenchError as error:
        missing = str(error)  # nothing lies in that folder
    else:
        check_images(images)
        return
    assert str(tmp_path) in missing


def unreachable(*_: object, **__: object) -> None:
    raise URLError("no network")


def check_images(images: Images) -> None:
    for split in (images.train, images.validation, images.test):
        data = split.to("cpu")
        assert len(data) == len(data.y) > 0
        assert (data.shape, data.classes) == (images.train.shape, images.train.classes)
        assert 0 <= data.x.min() < data.x.max() <= 1
        assert 0 <= data.y.min() <= data.y.max() < data.classes


@pytest.fixture(scope="module")
def victim() -> nn.Module:
    ctx = context(blobs().train, epochs=12, seed=1)
    net = ctx.new_student()
    fit(net, F.cross_entropy, ctx.data.x, ctx.data.y, ctx)
    return net.requires_grad_(False)


def stolen(attack: Attack, defense: Defense, victim: nn.Module, answers: Access = Access.PROBS) -> nn.Module:
    data = blobs().train
    service = defense.serve(victim, context(data))
    return attack.steal(Oracle(service, Scenario(access=answers), victim), context(data))


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", registry.names("defense"))
@pytest.mark.parametrize("queries", ["augmented", "once"])
@pytest.mark.parametrize("answers", [Access.LABEL, Access.PROBS])
def test_the_hard_label_thief_is_blind_to_answers_that_leave_the_label(
    name: str, queries: Literal["augmented", "once"], answers: Access, victim: nn.Module
) -> None:
    defense = method("defense", name)
    deployed = defense.harden(victim, context(blobs().train)).eval()
    met, unmet = (stolen(HardLabel(queries), served, deployed, answers) for served in (defense, Defense()))
    assert same(met, unmet) or not leaves_labels(defense, deployed)


def leaves_labels(defense: Defense, model: nn.Module) -> bool:
    data = blobs().train
    served = defense.serve(model, context(data))(data.x)
    return torch.equal(served.argmax(dim=1), model(data.x).argmax(dim=1))


@pytest.mark.parametrize("name", ["none", "stingy", "nasty"])
def test_built_in_defenses_leave_the_label_when_they_answer(name: str, victim: nn.Module) -> None:
    assert leaves_labels(method("defense", name), victim)


def test_the_soft_label_thief_does_see_what_stingy_withholds(victim: nn.Module) -> None:
    assert not same(stolen(KD(), method("defense", "stingy"), victim), stolen(KD(), Defense(), victim))


# Defenses that break a law


@dataclass(frozen=True)
class Tampering(Defense):
    """Writes into the victim that it was handed."""

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        hardened = copy.deepcopy(victim)
        next(victim.parameters()).data.add_(1.0)
        return hardened


@dataclass(frozen=True)
class Training(Defense):
    """Trains the victim itself, and so its batch norms too."""

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        victim.train()(ctx.data.x)
        return victim


@dataclass(frozen=True)
class Foreign(Defense):
    """Deploys a network of another architecture."""

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        return ctx.new_student("mini-16")


@dataclass(frozen=True)
class Global(Defense):
    """Draws its noise from torch's global generator."""

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        noise = torch.randn(())
        return lambda x: (model(x) + noise).log_softmax(dim=1)


@dataclass(frozen=True)
class Seeding(Defense):
    """Seeds torch's global generator."""

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        torch.manual_seed(ctx.seed)
        return victim


class Counter:
    calls = 0


@dataclass(frozen=True)
class Moody(Defense):
    """Hardens otherwise each time."""

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        hardened = copy.deepcopy(victim)
        Counter.calls += 1
        next(hardened.parameters()).data.add_(Counter.calls)
        return hardened


@dataclass(frozen=True)
class Raw(Defense):
    """Answers with logits."""

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        return lambda x: model(x) + 3


@dataclass(frozen=True)
class Silent(Defense):
    """Withholds every class."""

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        return lambda x: torch.full_like(model(x), -torch.inf)


@dataclass(frozen=True)
class Undefined(Defense):
    """Answers with NaN where it does not know."""

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        return lambda x: (model(x) * torch.nan).log_softmax(dim=1)


@dataclass(frozen=True)
class Curt(Defense):
    """Answers with the label alone, as a number."""

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        return lambda x: model(x).argmax(dim=1)


@dataclass(frozen=True)
class Forgetful(Defense):
    """Answers the same question otherwise, and does not say that it may."""

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        def service(x: Tensor) -> Tensor:
            z: Tensor = model(x)
            return (z + torch.randn(z.shape, generator=ctx.generator)).log_softmax(dim=1)

        return service


@dataclass(frozen=True)
class Dicing(Defense):
    """Says that it keeps state, and draws its noise from a generator of its own."""

    stateful: ClassVar[bool] = True

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        noise = torch.tensor(numpy.random.default_rng().normal(size=ctx.data.classes))
        return lambda x: (model(x) + noise).log_softmax(dim=1)


@dataclass(frozen=True)
class Mindful(Forgetful):
    """Answers the same question otherwise, and says that it may."""

    stateful: ClassVar[bool] = True


@dataclass(frozen=True)
class Demanding(Defense):
    """Has a field without a default."""

    strength: float


@dataclass(frozen=True)
class Wordless(Defense):
    strength: float = 1.0


class Undecorated(Defense):
    """Has fields that nobody knows of."""

    strength: float = 1.0


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Tampering(), "harden must leave the victim as it was"),
        (Training(), "harden must leave the victim as it was"),
        (Foreign(), "harden must return a network of the victim's architecture"),
        (Global(), "a defense must not draw from torch's global generator"),
        (Seeding(), "a defense must not draw from torch's global generator"),
        (Moody(), "harden must give the same weights for the same seed"),
        (Raw(), "the probabilities of an answer must sum to one"),
        (Silent(), "the probabilities of an answer must sum to one"),
        (Undefined(), "answers must be log-probabilities: no NaN, no \\+inf"),
        (Curt(), r"a service answers \(N,K\) = \(16, 3\), not \(16,\)"),
        (Forgetful(), "a question asked again must get the same answer, unless stateful = True"),
        (Dicing(), "serve must answer the same for the same seed"),
        (Demanding(1.0), "every field must have a default"),
        (Wordless(), "the class must say in a docstring what it does"),
        (Undecorated(), "the class must be a frozen dataclass"),
        (KD(), "the method must be a subclass of Defense"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Defense | Attack) else "",
)
def test_a_defense_that_breaks_a_law_is_caught_by_its_name(broken: Defense, law: str) -> None:
    with pytest.raises(BrokenContract, match=law):
        check_defense(broken)


def test_a_defense_that_says_it_keeps_state_may_answer_otherwise_when_asked_again() -> None:
    check_defense(Mindful())


# Attacks that break a law


@dataclass(frozen=True)
class Lazy(Attack):
    """Returns a fresh student; the laws do not ask for more."""

    needs: ClassVar[Access] = Access.LABEL

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return ctx.new_student()


@dataclass(frozen=True)
class Careless(Lazy):
    """Starts from weights out of the global generator."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        next(student.parameters()).data.normal_()
        return student


@dataclass(frozen=True)
class Fickle(Lazy):
    """Steals otherwise each time."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        Counter.calls += 1
        next(student.parameters()).data.fill_(Counter.calls)
        return student


@dataclass(frozen=True)
class Smuggling(Lazy):
    """Hands in a network of another architecture."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return ctx.new_student("mini-32")


@dataclass(frozen=True)
class Asking(Lazy):
    """Says that it needs nothing, and asks."""

    needs: ClassVar[Access] = Access.NOTHING

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        oracle(ctx.data.x)
        return ctx.new_student()


@dataclass(frozen=True)
class Understating(Lazy):
    """Says that it needs labels, and takes the weights."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return oracle.model()


@dataclass(frozen=True)
class Needless(Attack):
    """Does not say what it needs."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return ctx.new_student()


@dataclass(frozen=True)
class Greedy(Lazy):
    """Asks again and again until it is refused, and makes do with what it got."""

    asked: ClassVar[list[int]] = []

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        try:
            for _ in range(10):
                oracle(ctx.data.x[:7])
        except Refused:
            self.asked.append(oracle.answered)
        return ctx.new_student()


@dataclass(frozen=True)
class Forging(Lazy):
    """Turns the count back, which it finds in what the oracle's functions close over."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        cells = [cell.cell_contents for cell in oracle._count.__closure__ or ()]
        [meter] = [found for found in cells if isinstance(found, QueryCounter)]
        for _ in range(10):
            oracle(ctx.data.x[:7])
            meter.answered = 0
        return ctx.new_student()


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Careless(), "an attack must not draw from torch's global generator"),
        (Fickle(), "steal must give the same weights for the same seed"),
        (Smuggling(), r"steal must return a network as ctx\.new_student\(\) makes it"),
        (Asking(), r"an attack must work with what it says it needs \(NOTHING\); it asked the victim under"),
        (Understating(), r"an attack must work with what it says it needs \(LABEL\); it asked for the weights"),
        (Needless(), "an attack must say what it needs"),
        (Forging(), "an attack gets no more answers than its budget"),
        (Defense(), "the method must be a subclass of Attack"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Defense | Attack) else "",
)
def test_an_attack_that_breaks_a_law_is_caught_by_its_name(broken: Attack, law: str) -> None:
    with pytest.raises(BrokenContract, match=law):
        check_attack(broken)


def test_an_attack_that_asks_until_it_is_refused_is_stopped_at_its_budget() -> None:
    Greedy.asked.clear()
    check_attack(Greedy())
    assert Greedy.asked == [35]  # half of the 70 that it asked for without a budget


def test_an_attack_without_images_of_its_own_can_keep_the_contract() -> None:
    @dataclass(frozen=True)
    class Blind(Lazy):
        """Owns no images."""

        def data_subset(self) -> DataSubset:
            return DataSubset(0.0)

    check_attack(Blind())


def test_a_broken_contract_fails_a_test_like_any_assertion() -> None:
    assert issubclass(BrokenContract, AssertionError)
