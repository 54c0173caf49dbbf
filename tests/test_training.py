"""The training loop: what a seed decides, what a loss gets, learning rates, divergence."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import Slope, mean, network, plain, same, state, trained
from torch import Tensor, nn

from helpers import blobs, context
from kdbench.api import Diverged, KdbenchError, Recipe, Split, fit, kd_term, predict_logits
from kdbench.training.loop import rate


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


def test_training_learns_blobs_and_leaves_the_model_in_eval_mode(data: Split) -> None:
    ctx = context(data, epochs=15)
    model = ctx.new_student()
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    assert not any(module.training for module in model.modules())
    test = blobs().test
    assert (predict_logits(model, test.x).argmax(dim=1) == test.y).float().mean() > 0.95


@pytest.mark.parametrize("changes", [{}, {"crop": 1, "flip": True}, {"optimizer": "adam", "lr": 0.01}])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(data: Split, changes: dict[str, Any]) -> None:
    first, second, other = (state(trained(data, context(data, seed=s).training(**changes))) for s in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)


def test_training_neither_reads_nor_advances_the_global_generator(data: Split) -> None:
    first = state(trained(data, context(data)))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = state(trained(data, context(data)))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)


def test_dropout_drops_something_else_each_epoch(data: Split) -> None:
    masks = []

    class Watched(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            masks.append(super().forward(torch.ones_like(x)))
            return x

    model = nn.Sequential(nn.Flatten(), Watched(0.5), nn.Linear(64, 3))
    fit(model, F.cross_entropy, data.x, data.y, context(data, epochs=3).training(batch=len(data)))
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_each_epoch_trains_in_train_mode_whatever_was_done_to_the_model_before(data: Split) -> None:
    modes = []

    class Watched(Slope):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            self.eval()
            return super().forward(x)

    fit(Watched().eval(), mean, data.x, data.y, context(data, epochs=3).training(batch=len(data)))
    assert modes == [True, True, True]


@pytest.mark.parametrize("count", [1, 31, 32, 64, 70])
def test_each_epoch_goes_over_all_images_once_in_another_order(data: Split, count: int) -> None:
    model = Slope()
    fit(model, mean, data.x[:count], data.y[:count], context(data, epochs=2))
    epochs = torch.cat(model.seen).flatten(1).chunk(2)
    for seen in epochs:
        assert torch.equal(seen.sort(dim=0).values, data.x[:count].flatten(1).sort(dim=0).values)
    assert count == 1 or not torch.equal(*epochs)
    assert max(len(batch) for batch in model.seen) <= 32


@pytest.mark.parametrize(("count", "batches"), [(33, [32]), (65, [32, 32]), (34, [32, 2]), (1, [1])])
def test_a_last_batch_of_one_image_is_dropped_unless_it_is_all_there_is(
    data: Split, count: int, batches: list[int]
) -> None:
    model = Slope()
    fit(model, mean, data.x[:count], data.y[:count], context(data, epochs=1))
    assert [len(batch) for batch in model.seen] == batches


def test_a_network_with_batch_norm_trains_on_one_image_too_many(data: Split) -> None:
    assert math.isfinite(float(predict_logits(trained(data.take(torch.arange(33)), context(data)), data.x).sum()))


def test_without_images_there_is_nothing_to_train_on(data: Split) -> None:
    with pytest.raises(KdbenchError, match="no images to train on"):
        fit(network(), F.cross_entropy, data.x[:0], data.y[:0], context(data))


# What the loss takes


def test_a_tensor_of_targets_is_cut_to_the_batch() -> None:
    x = torch.linspace(0, 1, 50)[:, None, None, None]
    seen = []

    def loss(z: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return z.mean()

    model = Slope()
    fit(model, loss, x, x[:, 0, 0, 0], context(Split(x, torch.zeros(50).long(), 1)))
    for images, target in zip(model.seen, seen, strict=True):
        assert torch.equal(images[:, 0, 0, 0], target)


def test_a_function_as_target_is_called_on_each_augmented_batch_without_gradient(data: Split) -> None:
    model, teacher = Slope(), network().eval()
    asked: list[Tensor] = []

    def ask(x: Tensor) -> Tensor:
        asked.append(x)
        answer: Tensor = teacher(x)
        assert not answer.requires_grad
        return answer

    fit(model, mean, data.x, ask, context(data, epochs=3).training(crop=2, flip=True))
    assert sum(len(x) for x in asked) == 3 * len(data)
    assert all(torch.equal(one, other) for one, other in zip(asked, model.seen, strict=True))
    known = {tuple(image.flatten().tolist()) for image in data.x}
    assert not all(tuple(image.flatten().tolist()) in known for image in torch.cat(asked))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_tuple_of_targets_gives_the_loss_a_tuple(data: Split) -> None:
    shapes = set()

    def loss(z: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        y, answers, x = target
        assert torch.equal(answers[:, 0], x.flatten(1).sum(dim=1))
        shapes.add((len(z), tuple(y.shape), tuple(answers.shape)))
        return z.mean()

    fit(Slope(), loss, data.x, (data.y, lambda x: x.flatten(1).sum(dim=1, keepdim=True), data.x), context(data))
    assert shapes == {(32, (32,), (32, 1))}


def test_a_tensor_and_a_function_with_equal_values_train_to_equal_bits(data: Split) -> None:
    teacher = trained(data, context(data, seed=3))
    answers = torch.cat([teacher(part) for part in data.x.split(1)]).detach()
    table = {tuple(image.flatten().tolist()): answer for image, answer in zip(data.x, answers, strict=True)}

    def ask(x: Tensor) -> Tensor:
        return torch.stack([table[tuple(image.flatten().tolist())] for image in x])

    students = []
    for target in (answers, ask):
        student = network()
        fit(student, lambda z, log_p: kd_term(z, log_p, 4.0), data.x, target, context(data))
        students.append(state(student))
    assert same(*students)


# The learning rate


@pytest.mark.parametrize(("epoch", "expected"), [(0, 1.0), (1.99, 1.0), (2, 0.5), (3.5, 0.5), (4, 0.25), (5.9, 0.25)])
def test_at_each_milestone_the_rate_is_multiplied_by_gamma(epoch: float, expected: float) -> None:
    assert rate(Recipe(epochs=6, lr=1.0, milestones=(2, 4), gamma=0.5), epoch) == pytest.approx(expected)


def test_a_milestone_at_0_counts_from_the_first_step_on() -> None:
    assert rate(Recipe(lr=1.0, milestones=(0,), gamma=0.5), 0) == 0.5


@given(epochs=st.integers(1, 200), lr=st.floats(1e-4, 10))
def test_a_cosine_falls_from_lr_through_half_of_it_to_0(epochs: int, lr: float) -> None:
    recipe = Recipe(epochs=epochs, lr=lr, schedule="cosine")
    rates = [rate(recipe, epochs * share / 20) for share in range(21)]
    assert rates[0] == pytest.approx(lr)
    assert rates[10] == pytest.approx(lr / 2)
    assert rates[20] == pytest.approx(0, abs=1e-12)
    assert all(one > other for one, other in itertools.pairwise(rates))
    assert rates[3] + rates[17] == pytest.approx(lr)


@pytest.mark.parametrize("schedule", [{"milestones": (1, 2)}, {"schedule": "cosine"}])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_each_step_uses_the_rate_of_its_moment(data: Split, schedule: dict[str, Any], optimizer: str) -> None:
    ctx = plain(context(data, epochs=3), optimizer=optimizer, lr=0.5, **schedule)
    model = Slope()
    fit(model, mean, data.x, data.y, ctx)
    steps = -torch.tensor([*model.weights, model.weight.item()]).diff()
    moments = [epoch + step / 3 for epoch in range(3) for step in range(3)]  # 96 images: three batches of 32
    assert steps.tolist() == pytest.approx([rate(ctx.recipe, moment) for moment in moments], rel=1e-4)


def test_momentum_and_weight_decay_are_the_optimizers(data: Split) -> None:
    ctx = plain(context(data, epochs=1), lr=1.0, momentum=0.5, weight_decay=0.1)
    model = Slope()
    fit(model, mean, data.x, data.y, ctx)
    weight = velocity = 0.0
    for _ in range(3):
        velocity = 0.5 * velocity + 1 + 0.1 * weight
        weight -= velocity
    assert model.weight.item() == pytest.approx(weight)


@pytest.mark.parametrize(("clip", "expected"), [(0.0, -300.0), (2.0, -6.0), (1000.0, -300.0)])
def test_gradients_are_clipped_to_their_norm_and_0_is_no_limit(data: Split, clip: float, expected: float) -> None:
    model = Slope()
    ctx = plain(context(data, epochs=1), lr=1.0, clip=clip)
    fit(model, lambda z, _: 100 * z.mean(), data.x, data.y, ctx)
    assert model.weight.item() == pytest.approx(expected, rel=1e-4)


# Divergence


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_epoch(data: Split, bad: float, epoch: int) -> None:
    steps = 0

    def loss(z: Tensor, _: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return z.mean() * (bad if steps == 3 * epoch + 2 else 1.0)

    model = Slope()
    nn.init.ones_(model.weight)
    with pytest.raises(Diverged, match=f"the loss was not finite in epoch {epoch}$") as caught:
        fit(model, loss, data.x, data.y, context(data, epochs=4))
    assert caught.value.epoch == epoch
    assert steps == 3 * (epoch + 1)
    assert isinstance(caught.value, KdbenchError)


def test_a_huge_rate_diverges(data: Split) -> None:
    with pytest.raises(Diverged):
        trained(data, context(data).training(lr=1e30))
