"""The contract suite catches an attack that breaks a law, and names the law."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from kdbench.api import (
    Access,
    Attack,
    Context,
    DataSubset,
    Defense,
    Oracle,
    Refused,
)
from kdbench.game.threat import QueryCounter
from kdbench.testing import BrokenContract, check_attack


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


class Counter:
    calls = 0


@dataclass(frozen=True)
class Inconsistent(Lazy):
    """Returns another student each time."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        Counter.calls += 1
        next(student.parameters()).data.fill_(Counter.calls)
        return student


@dataclass(frozen=True)
class Smuggling(Lazy):
    """Returns a network of another architecture."""

    def networks(self) -> tuple[str, ...]:
        return ("mini-32",)

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return ctx.new_student("mini-32")


@dataclass(frozen=True)
class Foreign(Lazy):
    """Makes a network that it does not name."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        ctx.new_student("mini-16")
        return student


@dataclass(frozen=True)
class Reading(Lazy):
    """Uses surrogate data that it does not name."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        ctx.surrogate("photos")
        return ctx.new_student()


@dataclass(frozen=True)
class Second(Lazy):
    """Returns the network that it made second."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        ctx.new_student()
        return ctx.new_student()


@dataclass(frozen=True)
class Resuming(Lazy):
    """Saves that it was interrupted, and shows it."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student, checkpoint = ctx.new_student(), ctx.checkpoint("here")
        if checkpoint.load() is not None:
            next(student.parameters()).data.fill_(1.0)
        elif checkpoint.due():
            checkpoint.save({})
        return student


@dataclass(frozen=True)
class Recounting(Lazy):
    """Logs another number after an interruption."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        checkpoint = ctx.checkpoint("here")
        ctx.log("resumed", float(checkpoint.load() is not None))
        checkpoint.save({})
        return ctx.new_student()


@dataclass(frozen=True)
class Thrifty(Lazy):
    """Learns something else where there is a budget."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        oracle(ctx.data.x[:7])
        if oracle.left is not None:
            next(student.parameters()).data.fill_(1.0)
        return student


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
        [counter] = [found for found in cells if isinstance(found, QueryCounter)]
        for _ in range(10):
            oracle(ctx.data.x[:7])
            counter.answered = 0
        return ctx.new_student()


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Careless(), "an attack must not draw from torch's global generator"),
        (Inconsistent(), "steal must give the same weights for the same seed"),
        (Smuggling(), r"steal must return a network as ctx\.new_student\(\) makes it"),
        (Asking(), r"an attack must work with what it says it needs \(NOTHING\); it asked the victim in"),
        (Understating(), r"an attack must work with what it says it needs \(LABEL\); it asked for the weights"),
        (Needless(), "an attack must say what it needs"),
        (Foreign(), r"networks\(\) must name 'mini-16', for which steal asks"),
        (Reading(), r"surrogate_datasets\(\) must name 'photos', for which steal asks"),
        (Second(), "steal must return the network that it made first"),
        (Resuming(), "an interrupted run must go on to the same student"),
        (Recounting(), "an interrupted run must go on to the same logged numbers"),
        (Thrifty(), "a budget that suffices must not change the student"),
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
    assert Greedy.asked == [63]  # one answer less than the 70 that it asked for without a budget


def test_an_attack_without_images_of_its_own_can_keep_the_contract() -> None:
    @dataclass(frozen=True)
    class Blind(Lazy):
        """Owns no images."""

        def data_subset(self) -> DataSubset:
            return DataSubset(0.0)

    check_attack(Blind())


def test_a_broken_contract_fails_a_test_like_any_assertion() -> None:
    assert issubclass(BrokenContract, AssertionError)
