"""The contract suite catches a defense that breaks a law, and names the law."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy
import pytest
import torch
from torch import Tensor, nn

from kdbench.api import (
    Attack,
    Context,
    Defense,
    Service,
)
from kdbench.attacks.kd import KD
from kdbench.testing import BrokenContract, check_defense


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
class Averaging(Defense):
    """Answers every image of a batch with the mean of the batch."""

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return log_p.exp().mean(dim=0, keepdim=True).log().expand_as(log_p)


@dataclass(frozen=True)
class Perturbing(Defense):
    """Says that it is the undefended victim, and perturbs its answers."""

    is_reference: ClassVar[bool] = True

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return log_p


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
        (Averaging(), "an answer must not depend on the other images of its batch"),
        (Perturbing(), "a reference must not act on answers"),
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
