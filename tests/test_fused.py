"""Fused training: students of a fused group end as they would alone, whoever else is in the group."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_runs import RECIPES, Method, alone, assert_close, fitting, together, with_recipe
from torch import Tensor, nn

from helpers import blobs, context
from kdbench.api import Context, Diverged, Split, fit
from kdbench.attacks.kd import kd_loss
from kdbench.training.fused import FusedGroup


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the fused groups that are made."""
    sizes: list[int] = []

    def of(loops: Sequence[Any]) -> FusedGroup | None:
        group = made(loops)
        sizes.extend([len(loops)] if group else [])
        return group

    made = FusedGroup.of
    monkeypatch.setattr(FusedGroup, "of", of)
    return sizes


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_students_of_a_fused_group_end_as_alone(data: Split, groups: list[int], recipe: dict[str, Any]) -> None:
    def methods() -> list[tuple[Method, Context]]:
        teacher = context(data, seed=9).new_student("mini-16").eval()
        return [
            (fitting(F.cross_entropy, data.y, data), with_recipe(0, **recipe)),
            (fitting(F.cross_entropy, data.y, data), with_recipe(1, **recipe)),
            (fitting(kd_loss(4, 0.9, labelled=True), (teacher, data.y), data), with_recipe(0, **recipe)),
            (fitting(kd_loss(20, 1.0, labelled=False), (teacher, data.y), data), with_recipe(2, **recipe)),
        ]

    solo, fused = alone(methods()), together(methods())
    assert groups == [4]
    for ours, theirs in zip(fused, solo, strict=True):
        assert_close(ours, theirs)
        assert not ours.training
        assert all(p.grad is None for p in ours.parameters())
    for one, other in itertools.pairwise(solo):
        with pytest.raises(AssertionError):
            assert_close(one, other)  # they have learnt different things


def test_fused_training_leaves_generators_where_solo_runs_do(data: Split) -> None:
    contexts = [[with_recipe(seed, crop=1) for seed in range(3)] for _ in range(2)]
    for run, own in zip((alone, together), contexts, strict=True):
        run([(fitting(F.cross_entropy, data.y, data), ctx) for ctx in own])
    for ours, theirs in zip(*contexts, strict=True):
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())


@pytest.mark.parametrize("change", [{"clip": 1.0}, {"epochs": 2}, {"lr": 0.01}], ids=str)
def test_fits_of_no_fusible_group_train_alone_to_the_same_bits(
    data: Split, groups: list[int], change: dict[str, Any]
) -> None:
    both = {"clip": change.get("clip", 0.0)}

    def methods() -> list[tuple[Method, Context]]:
        return [
            (fitting(F.cross_entropy, data.y, data), with_recipe(0, **both)),
            (fitting(F.cross_entropy, data.y, data), with_recipe(1, **change)),
        ]

    for ours, theirs in zip(together(methods()), alone(methods()), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert groups == []


def test_fits_with_fewer_images_form_a_group_of_their_own(data: Split, groups: list[int]) -> None:
    few = data.take(torch.arange(48))
    methods = [(fitting(F.cross_entropy, part.y, part), with_recipe(seed)) for part in (data, few) for seed in range(2)]
    together(methods)
    assert groups == [2, 2]


def test_a_method_may_fit_again_what_others_do_not(data: Split, groups: list[int]) -> None:
    def two(ctx: Context) -> nn.Module:
        fitting(F.cross_entropy, data.y, data, "mini-16")(ctx)
        return fitting(F.cross_entropy, data.y, data)(ctx)

    def methods() -> list[tuple[Method, Context]]:
        one = fitting(F.cross_entropy, data.y, data)
        return [(two, with_recipe(0)), (one, with_recipe(1)), (two, with_recipe(2)), (one, with_recipe(3))]

    fused, solo = together(methods()), alone(methods())
    assert groups == [2, 2, 2]  # two mini-16 beside two mini-8, then the mini-8 of those who had two to train
    for ours, theirs in zip(fused, solo, strict=True):
        assert_close(ours, theirs)


def test_a_fit_that_diverges_raises_in_its_method_and_the_others_go_on(data: Split, groups: list[int]) -> None:
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
    fused = together([(diverging, with_recipe(0)), *((run, with_recipe(seed)) for run, seed in others)])
    assert "epoch 1" in str(caught[0])
    assert groups == [3, 2]
    for ours, theirs in zip(fused[1:], alone([(run, with_recipe(seed)) for run, seed in others]), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["the answers", "the loss"])
def test_a_fit_that_fails_midway_raises_in_its_method_and_its_student_keeps_its_weights(
    data: Split, groups: list[int], where: str
) -> None:
    """As for an attack that catches the refusal of an oracle whose budget is spent: the weights are those of a solo run."""

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

    def methods() -> list[tuple[Method, Context]]:
        fine = fitting(F.cross_entropy, data.y, data)
        return [(fine, with_recipe(1)), (failing, with_recipe(0)), (fine, with_recipe(2))]

    fused, solo = together(methods()), alone(methods())
    assert groups == [3, 2]
    for ours, theirs in zip(fused, solo, strict=True):
        assert_close(ours, theirs)


def test_each_teacher_of_a_fused_group_is_asked_about_its_own_batches(data: Split) -> None:
    """The very images, in the very order, that it would be asked about alone."""
    asked: list[list[Tensor]] = []

    def methods() -> list[tuple[Method, Context]]:
        found = []
        for seed in range(3):
            own: list[Tensor] = []
            asked.append(own)

            def teacher(x: Tensor, own: list[Tensor] = own) -> Tensor:
                own.append(x.clone())
                return x.flatten(1)[:, :3]

            run = fitting(kd_loss(4, 0.9, labelled=True), (teacher, data.y), data)
            found.append((run, with_recipe(seed, crop=1, flip=True)))
        return found

    alone(methods())
    together(methods())
    for theirs, ours in zip(asked[:3], asked[3:], strict=True):
        assert len(ours) == len(theirs) == 9
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
