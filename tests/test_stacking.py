"""Stacks: students that train together come out as they would alone, whoever else is in the stack."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import blobs, context, playable
from kdbench import registry
from kdbench.api import Context, Diverged, Loss, Split, fit
from kdbench.attacks.kd import kd_loss
from kdbench.game.methods import Log
from kdbench.training import fused as stacking
from kdbench.training.fused import FusedGroup, FusedTraining, fused_network

RTOL, ATOL = 1e-3, 1e-4  # of weights after some ten steps: sums in another order, grown on the way
# Their layers mix channels of all members (concatenation, shuffling), or draw random numbers.
SOLO = {"shufflenetv2", "distillation-mnist", "distillation-cifar10"}

MethodRecord = Callable[[Context], nn.Module]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the stacks that are made."""
    sizes: list[int] = []

    def of(works: Sequence[Any]) -> FusedGroup | None:
        stack = made(works)
        sizes.extend([len(works)] if stack else [])
        return stack

    made = FusedGroup.of
    monkeypatch.setattr(stacking.FusedGroup, "of", of)
    return sizes


def fitting(loss: Loss, target: Any, data: Split, model: str | None = None) -> MethodRecord:
    def play(ctx: Context) -> nn.Module:
        student = ctx.new_student(model)
        fit(student, loss, data.x, target, ctx)
        return student

    return play


def alone(players: Sequence[tuple[MethodRecord, Context]]) -> list[nn.Module]:
    return [play(ctx) for play, ctx in players]


def together(players: Sequence[tuple[MethodRecord, Context]]) -> list[nn.Module]:
    """What each player makes; what one raises comes at the end."""
    fused = FusedTraining()
    made: dict[int, nn.Module] = {}
    raised: list[BaseException] = []

    def seat(number: int, play: MethodRecord, ctx: Context) -> None:
        try:
            made[number] = play(replace(ctx, fused=fused))
        except BaseException as error:
            raised.append(error)

    fused.play([lambda n=n, p=p, c=c: seat(n, p, c) for n, (p, c) in enumerate(players)])  # type: ignore[misc]
    if raised:
        raise raised[0]
    return [made[n] for n in range(len(players))]


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=RTOL, atol=ATOL), f"{name}: {(one - other).abs().max()}"


def with_recipe(seed: int, **changes: Any) -> Context:
    return context(blobs().train, epochs=3, seed=seed).training(**changes)


RECIPES: list[dict[str, Any]] = [
    {},
    {"optimizer": "adam", "lr": 0.001},
    {"momentum": 0.0},
    {"nesterov": True, "schedule": "cosine"},
    {"crop": 1, "flip": True, "batch": 25},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_students_of_a_stack_come_out_as_alone(data: Split, stacks: list[int], recipe: dict[str, Any]) -> None:
    def players() -> list[tuple[MethodRecord, Context]]:
        teacher = context(data, seed=9).new_student("mini-16").eval()
        return [
            (fitting(F.cross_entropy, data.y, data), with_recipe(0, **recipe)),
            (fitting(F.cross_entropy, data.y, data), with_recipe(1, **recipe)),
            (fitting(kd_loss(4, 0.9, labelled=True), (teacher, data.y), data), with_recipe(0, **recipe)),
            (fitting(kd_loss(20, 1.0, labelled=False), (teacher, data.y), data), with_recipe(2, **recipe)),
        ]

    solo, fused = alone(players()), together(players())
    assert stacks == [4]
    for ours, theirs in zip(fused, solo, strict=True):
        assert_close(ours, theirs)
        assert not ours.training
        assert all(p.grad is None for p in ours.parameters())
    for one, other in itertools.pairwise(solo):
        with pytest.raises(AssertionError):
            assert_close(one, other)  # they have learnt different things


def test_a_stack_leaves_generators_where_they_would_be(data: Split) -> None:
    contexts = [[with_recipe(seed, crop=1) for seed in range(3)] for _ in range(2)]
    for contest, contenders in zip((alone, together), contexts, strict=True):
        contest([(fitting(F.cross_entropy, data.y, data), ctx) for ctx in contenders])
    for ours, theirs in zip(*contexts, strict=True):
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())


@pytest.mark.parametrize("name", playable("model"))
def test_each_network_stacks_or_is_left_alone(name: str) -> None:
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        members.append(registry.load("model", name)((3, 32, 32), 10))
    x = torch.rand(2, 3, 32, 32)
    before = [copy.deepcopy(member.state_dict()) for member in members]
    stack = fused_network(members, x)
    assert (stack is None) == (name in SOLO)
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in member.state_dict().items())
    if stack:
        answers = stack(torch.cat([x, x], dim=1))
        for k, member in enumerate(members):
            expected = member(x)
            assert (answers[:, k] - expected).abs().max() <= 0.01 * expected.abs().max()  # in fp32


class Odd(nn.Module):
    """A layer with weights of a kind that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(10, 10), nn.Linear(10, 10)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.other(self.one(x))
        return z


@pytest.mark.parametrize("layer", [Odd, Tied, lambda: nn.Dropout(0.5), lambda: nn.LayerNorm(10), lambda: nn.Softmax(1)])
def test_what_would_not_be_the_same_is_not_stacked(layer: Callable[[], nn.Module]) -> None:
    members = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10), layer()) for _ in range(2)]
    assert fused_network(members, torch.rand(16, 1, 8, 8)) is None


@pytest.mark.parametrize("change", [{"clip": 1.0}, {"epochs": 2}, {"lr": 0.01}], ids=str)
def test_those_who_do_not_go_together_train_alone_to_the_same_bits(
    data: Split, stacks: list[int], change: dict[str, Any]
) -> None:
    both = {"clip": change.get("clip", 0.0)}

    def players() -> list[tuple[MethodRecord, Context]]:
        return [
            (fitting(F.cross_entropy, data.y, data), with_recipe(0, **both)),
            (fitting(F.cross_entropy, data.y, data), with_recipe(1, **change)),
        ]

    for ours, theirs in zip(together(players()), alone(players()), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert stacks == []


def test_players_with_less_data_form_a_stack_of_their_own(data: Split, stacks: list[int]) -> None:
    few = data.take(torch.arange(48))
    players = [(fitting(F.cross_entropy, part.y, part), with_recipe(seed)) for part in (data, few) for seed in range(2)]
    together(players)
    assert stacks == [2, 2]


def test_a_player_may_fit_again_and_alone_what_others_do_not(data: Split, stacks: list[int]) -> None:
    def two(ctx: Context) -> nn.Module:
        fitting(F.cross_entropy, data.y, data, "mini-16")(ctx)
        return fitting(F.cross_entropy, data.y, data)(ctx)

    def players() -> list[tuple[MethodRecord, Context]]:
        one = fitting(F.cross_entropy, data.y, data)
        return [(two, with_recipe(0)), (one, with_recipe(1)), (two, with_recipe(2)), (one, with_recipe(3))]

    fused, solo = together(players()), alone(players())
    assert stacks == [2, 2, 2]  # two mini-16 beside two mini-8, then the mini-8 of those who had two to train
    for ours, theirs in zip(fused, solo, strict=True):
        assert_close(ours, theirs)


def test_one_that_diverges_is_told_and_the_others_go_on(data: Split, stacks: list[int]) -> None:
    steps: list[int] = []

    def breaking(z: Tensor, y: Tensor) -> Tensor:
        steps.append(1)
        loss = F.cross_entropy(z, y)
        return loss * torch.nan if len(steps) > 4 else loss  # three steps an epoch

    caught: list[Diverged] = []

    def diverging(ctx: Context) -> nn.Module:
        with pytest.raises(Diverged) as info:
            fitting(breaking, data.y, data)(ctx)
        caught.append(info.value)
        return nn.Identity()

    others = [(fitting(F.cross_entropy, data.y, data), seed) for seed in (1, 2)]
    fused = together([(diverging, with_recipe(0)), *((play, with_recipe(seed)) for play, seed in others)])
    assert "epoch 1" in str(caught[0])
    assert stacks == [3, 2]
    for ours, theirs in zip(fused[1:], alone([(play, with_recipe(seed)) for play, seed in others]), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["the answers", "the loss"])
def test_one_that_fails_midway_is_told_and_keeps_what_its_student_has_learnt(
    data: Split, stacks: list[int], where: str
) -> None:
    """As a player who catches the refusal of an oracle whose budget is spent would find it alone."""

    def failing(ctx: Context) -> nn.Module:
        asked: list[int] = []

        def fail(place: str) -> None:
            if place == where:
                asked.append(1)
            if len(asked) > 4:  # of three steps an epoch
                raise ZeroDivisionError

        def target(x: Tensor) -> Tensor:
            fail("the answers")
            return x.flatten(1)[:, :3]

        def loss(z: Tensor, answers: Tensor) -> Tensor:
            fail("the loss")
            return F.cross_entropy(z, answers.softmax(1))

        student = ctx.new_student()
        with pytest.raises(ZeroDivisionError):
            fit(student, loss, data.x, target, ctx)
        return student

    def players() -> list[tuple[MethodRecord, Context]]:
        fine = fitting(F.cross_entropy, data.y, data)
        return [(fine, with_recipe(1)), (failing, with_recipe(0)), (fine, with_recipe(2))]

    fused, solo = together(players()), alone(players())
    assert stacks == [3, 2]
    for ours, theirs in zip(fused, solo, strict=True):
        assert_close(ours, theirs)


class Keeping(Log):
    """Keeps checkpoints in memory, and stops the player at one of them."""

    class Stop(BaseException):
        pass

    def __init__(self, generator: torch.Generator, kept: dict[str, Any], stop_after: int) -> None:
        super().__init__()
        self._generator, self._kept, self._left = generator, kept, stop_after

    def due(self) -> bool:
        return True

    def save(self, slot: str, state: Any) -> None:
        self._kept[slot] = copy.deepcopy(state), self._generator.get_state()
        self._left -= 1
        if not self._left:
            raise self.Stop

    def load(self, slot: str) -> Any:
        if slot not in self._kept:
            return None
        state, generator = self._kept[slot]
        self._generator.set_state(generator)
        return copy.deepcopy(state)


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=str)
@pytest.mark.parametrize("before", [alone, together])
@pytest.mark.parametrize("after", [alone, together])
def test_a_checkpoint_of_a_stack_is_that_of_its_members(
    data: Split, recipe: dict[str, Any], before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    """Whether it was made alone or together, it is resumed alone or together, to the same students."""
    kept: list[dict[str, Any]] = [{} for _ in range(3)]

    def players(stop_after: int) -> list[tuple[MethodRecord, Context]]:
        contexts = [with_recipe(seed, epochs=4, **recipe) for seed in range(3)]
        logs = [Keeping(ctx.generator, kept[n], stop_after) for n, ctx in enumerate(contexts)]
        play = fitting(F.cross_entropy, data.y, data)
        return [(play, replace(ctx, log=log)) for ctx, log in zip(contexts, logs, strict=True)]

    if before is alone:
        for player in players(2):
            with pytest.raises(Keeping.Stop):
                alone([player])
    else:
        with pytest.raises(Keeping.Stop):
            together(players(2))
    assert [state["part-1"][0]["epochs"] for state in kept] == [2, 2, 2]
    resumed = after(players(0))
    kept = [{} for _ in range(3)]
    for ours, theirs in zip(resumed, alone(players(0)), strict=True):
        assert_close(ours, theirs)


def test_a_stack_asks_each_teacher_about_its_own_batches(data: Split) -> None:
    """The very images, in the very order, that it would be asked about alone."""
    asked: list[list[Tensor]] = []

    def players() -> list[tuple[MethodRecord, Context]]:
        found = []
        for seed in range(3):
            heard: list[Tensor] = []
            asked.append(heard)

            def teacher(x: Tensor, heard: list[Tensor] = heard) -> Tensor:
                heard.append(x.clone())
                return x.flatten(1)[:, :3]

            play = fitting(kd_loss(4, 0.9, labelled=True), (teacher, data.y), data)
            found.append((play, with_recipe(seed, crop=1, flip=True)))
        return found

    alone(players())
    together(players())
    for theirs, ours in zip(asked[:3], asked[3:], strict=True):
        assert len(ours) == len(theirs) == 9
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
