"""The one training loop and its twin for answers, and the formulas that methods share."""

import copy
import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import blobs, context
from kdbench.api import (
    Context,
    Diverged,
    KdbenchError,
    Log,
    Precision,
    Recipe,
    Split,
    fit,
    inference,
    jensen_shannon,
    kd,
    kd_term,
    kl,
    predict_logits,
    soft_cross_entropy,
    soften,
)
from kdbench.attacks.kd import kd_loss
from kdbench.training.augmentation import augmented
from kdbench.training.loop import rate

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


def state(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def network(width: int = 24) -> nn.Module:
    """For blobs; with batch norm and dropout: buffers, and draws from the global generator, too."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hidden = [nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 3))


def trained(data: Split, ctx: Context) -> nn.Module:
    model = network()
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    return model


class Slope(nn.Module):
    """One weight, which every image is answered with: with the loss z.mean() its gradient is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.weights: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.weights.append(self.weight.item())
        return self.weight.expand(len(x), 1)


def mean(z: Tensor, _: object) -> Tensor:
    return z.mean()


def plain(ctx: Context, **changes: Any) -> Context:
    """The context with SGD that adds nothing to the gradient."""
    return ctx.training(**{"momentum": 0.0, "weight_decay": 0.0, **changes})


# Training


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


def test_training_neither_hears_nor_moves_the_global_generator(data: Split) -> None:
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


def test_a_callable_target_is_asked_on_each_augmented_batch_without_gradient(data: Split) -> None:
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


def test_a_tensor_and_a_callable_that_gives_the_same_train_the_same(data: Split) -> None:
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


# The rate


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
def test_each_step_goes_by_the_rate_of_its_moment(data: Split, schedule: dict[str, Any], optimizer: str) -> None:
    ctx = plain(context(data, epochs=3), optimizer=optimizer, lr=0.5, **schedule)
    model = Slope()
    fit(model, mean, data.x, data.y, ctx)
    ways = -torch.tensor([*model.weights, model.weight.item()]).diff()
    moments = [epoch + step / 3 for epoch in range(3) for step in range(3)]  # 96 images: three batches of 32
    assert ways.tolist() == pytest.approx([rate(ctx.recipe, moment) for moment in moments], rel=1e-4)


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


# Augmentation


def shifts(image: Tensor, pad: int) -> dict[tuple[int, int], Tensor]:
    """All crops of one image (C,H,W) after zero padding, by their corner."""
    _, height, width = image.shape
    wide = F.pad(image, (pad, pad, pad, pad))
    span = range(2 * pad + 1)
    return {(top, left): wide[:, top : top + height, left : left + width] for top in span for left in span}


@pytest.fixture
def images() -> Tensor:
    """The same image 600 times, no two pixels alike and none 0; two channels, higher than wide."""
    return torch.arange(1.0, 61.0).reshape(1, 2, 6, 5).expand(600, -1, -1, -1) / 60


@pytest.mark.parametrize("pad", [1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs(images: Tensor, pad: int, flip: bool) -> None:
    x = augmented(images, Recipe(crop=pad, flip=flip), torch.Generator().manual_seed(0))(torch.arange(len(images)))
    assert x.shape == images.shape
    allowed = {(corner, False): window for corner, window in shifts(images[0], pad).items()}
    if flip:
        allowed |= {(corner, True): window.flip(2) for (corner, _), window in allowed.items()}
    found = [[key for key, window in allowed.items() if torch.equal(image, window)] for image in x]
    assert all(len(keys) == 1 for keys in found)
    assert {keys[0] for keys in found} == allowed.keys()


def test_a_flip_is_left_to_right_for_about_half_of_the_images(images: Tensor) -> None:
    x = augmented(images, Recipe(flip=True), torch.Generator().manual_seed(0))(torch.arange(len(images)))
    flipped = (x == images.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(x[~flipped], images[~flipped])
    assert 240 < int(flipped.sum()) < 360


def test_without_crop_and_flip_images_stay_as_they_are_and_nothing_is_drawn(images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(augmented(images, Recipe(crop=0, flip=False), generator)(torch.arange(len(images))), images)
    assert torch.equal(generator.get_state(), before)


def test_augmentation_leaves_the_data_as_they_are(data: Split) -> None:
    before = data.x.clone()
    trained(data, context(data).training(crop=2, flip=True))
    assert torch.equal(data.x, before)


# Interruptions


class Diary(Log):
    """Keeps a checkpoint an epoch in memory; begins with one of another diary's, if given."""

    def __init__(self, generator: torch.Generator, kept: Any = None) -> None:
        super().__init__()
        self.pages: list[Any] = []
        self.shares: list[float] = []
        self._generator, self._kept = generator, kept

    def progress(self, share: float, text: str) -> None:
        self.shares.append(share)

    def due(self) -> bool:
        return True

    def save(self, slot: str, state: Mapping[str, Any]) -> None:
        self.pages.append((slot, copy.deepcopy(state), self._generator.get_state()))

    def load(self, slot: str) -> Any:
        if self._kept is None or self._kept[0] != slot:
            return None
        self._generator.set_state(self._kept[2])
        return copy.deepcopy(self._kept[1])


def noted(data: Split, changes: dict[str, Any], kept: Any = None) -> tuple[State, Diary]:
    """A fit of five epochs, from the start or from what was kept; its model and its diary."""
    ctx = context(data, epochs=5).training(**changes)
    diary = Diary(ctx.generator, kept)
    ctx = Context(ctx.data, ctx.recipe, ctx.device, ctx.seed, ctx.new_student, ctx.generator, diary)
    return state(trained(data, ctx)), diary


RECIPES: list[dict[str, Any]] = [
    {"crop": 1, "flip": True, "milestones": (2, 4)},
    {"optimizer": "adam", "lr": 0.01, "schedule": "cosine"},
    {"nesterov": True, "clip": 0.5},
]


@pytest.mark.parametrize("changes", RECIPES)
def test_a_fit_resumed_after_any_epoch_ends_with_the_same_bits(data: Split, changes: dict[str, Any]) -> None:
    uninterrupted = state(trained(data, context(data, epochs=5).training(**changes)))
    watched, diary = noted(data, changes)
    assert same(watched, uninterrupted)
    assert [page[1]["epochs"] for page in diary.pages] == [1, 2, 3, 4, 5]
    for epochs, page in enumerate(diary.pages, 1):
        resumed, rest = noted(data, changes, page)
        assert same(resumed, uninterrupted)
        assert [later[1]["epochs"] for later in rest.pages] == list(range(epochs + 1, 6))


def test_a_resumed_fit_leaves_the_model_in_eval_mode_even_if_nothing_was_left_to_do(data: Split) -> None:
    _, diary = noted(data, {})
    ctx = context(data, epochs=5)
    model = network().train()
    kept = Diary(ctx.generator, diary.pages[-1])
    fit(
        model,
        F.cross_entropy,
        data.x,
        data.y,
        Context(data, ctx.recipe, "cpu", 0, ctx.new_student, ctx.generator, kept),
    )
    assert not any(module.training for module in model.modules())
    assert kept.pages == []


def test_each_fit_of_a_stage_keeps_its_checkpoints_under_a_name_of_its_own(data: Split) -> None:
    ctx = context(data)
    diary = Diary(ctx.generator)
    ctx = Context(data, ctx.recipe, "cpu", 0, ctx.new_student, ctx.generator, diary)
    trained(data, ctx)
    trained(data, ctx)
    slots = [page[0] for page in diary.pages]
    assert slots[0] == slots[1] != slots[2] == slots[3]


def test_progress_goes_up_to_all(data: Split) -> None:
    _, diary = noted(data, {})
    assert diary.shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_log_that_keeps_nothing_is_asked_to_keep_nothing(data: Split) -> None:
    log = Log()
    log("loss", 3)
    assert log.numbers == {"loss": 3.0}
    assert not log.due()
    assert log.load(log.slot()) is None
    assert log.slot() != log.slot()


# Answers


@pytest.mark.parametrize("batch", [1, 7, 1024])
def test_infer_answers_as_the_model_in_eval_mode_without_gradient(data: Split, batch: int) -> None:
    model = trained(data, context(data)).train()
    z = predict_logits(model, data.x.clone().requires_grad_(), batch)
    assert not z.requires_grad
    assert not model.training
    torch.testing.assert_close(z, model.eval()(data.x))


def test_infer_changes_nothing_in_the_model(data: Split) -> None:
    model = network()
    before = state(model)
    predict_logits(model, data.x)
    assert same(state(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_infer_of_no_images_is_no_answers(data: Split) -> None:
    assert predict_logits(network(), data.x[:0]).shape == (0, 3)


# Formulas


FLOATS = st.floats(-20, 20)
PAIRS = st.integers(2, 6).flatmap(
    lambda k: st.tuples(*[st.lists(FLOATS, min_size=k, max_size=k).map(lambda row: torch.tensor([row]).double())] * 2)
)


def some_logits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's log-probabilities with a class withheld from every row, labels."""
    generator = torch.Generator().manual_seed(seed)
    z, teacher = torch.randn(2, 8, 5, generator=generator)
    hidden = torch.arange(8) % 5
    teacher[torch.arange(8), hidden] = -torch.inf
    return z, teacher.log_softmax(dim=1), (hidden + 1) % 5


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_a_student_learns_from_a_teacher_that_withholds_classes(T: float) -> None:
    z, log_p, y = some_logits()
    z.requires_grad_()
    value = kd(z, log_p, y, T, 0.9)
    value.backward()
    assert math.isfinite(value.item())
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad[log_p == -torch.inf] > 0).all()  # what was withheld is pushed down


@pytest.mark.parametrize(("gap", "T"), [(500.0, 4.0), (420.0, 1.0), (3000.0, 20.0)])
def test_a_softened_probability_that_vanishes_in_float32_has_the_gradient_of_its_limit(gap: float, T: float) -> None:
    def gradient(dtype: torch.dtype) -> Tensor:
        z = torch.tensor([[gap, 0.0, gap - 1.0]], dtype=dtype, requires_grad=True)
        kl(soften(z, T), torch.tensor([[0.2, 0.3, 0.5]], dtype=dtype).log()).backward()
        assert z.grad is not None
        return z.grad.float()

    torch.testing.assert_close(gradient(torch.float32), gradient(torch.float64))


def test_the_gradient_of_distillation_is_student_less_teacher_at_that_temperature() -> None:
    z, log_p, _ = some_logits()
    z.requires_grad_()
    kd_term(z, log_p, 4.0).backward()
    expected = 4.0 * ((z / 4).softmax(dim=1) - soften(log_p, 4.0)) / len(z)
    torch.testing.assert_close(z.grad, expected.detach())


def test_without_labels_the_term_of_distillation_stands_alone() -> None:
    z, log_p, y = some_logits()
    assert kd(z, log_p, None, 4.0, 0.9) == kd_term(z, log_p, 4.0)
    torch.testing.assert_close(kd(z, log_p, y, 4.0, 0.0), F.cross_entropy(z, y))
    torch.testing.assert_close(kd(z, log_p, y, 4.0, 1.0), kd_term(z, log_p, 4.0))


@given(pair=PAIRS, T=st.floats(0.5, 50), shift=FLOATS)
def test_softening_hears_nothing_of_a_constant_so_log_probabilities_serve_as_logits(
    pair: tuple[Tensor, Tensor], T: float, shift: float
) -> None:
    z, _ = pair
    torch.testing.assert_close(soften(z + shift, T), soften(z, T))
    torch.testing.assert_close(soften(z.log_softmax(dim=1), T), (z / T).softmax(dim=1))


def test_softening_keeps_withheld_classes_at_0_at_every_temperature() -> None:
    log_p = torch.tensor([[0.0, -torch.inf, -1.0]])
    for T in (0.1, 1.0, 1000.0):
        p = soften(log_p, T)
        assert p[0, 1] == 0
        assert float(p.sum()) == pytest.approx(1)


@given(pair=PAIRS)
def test_a_divergence_is_never_negative_and_0_between_equals(pair: tuple[Tensor, Tensor]) -> None:
    p, q = (z.softmax(dim=1) for z in pair)
    assert kl(p, q.log()) >= -1e-12
    assert float(kl(p, p.log())) == pytest.approx(0, abs=1e-12)


@given(pair=PAIRS)
def test_jensen_shannon_is_symmetric_and_between_0_and_log_2(pair: tuple[Tensor, Tensor]) -> None:
    p, q = (z.softmax(dim=1) for z in pair)
    divergence = float(jensen_shannon(p, q))
    assert -1e-12 <= divergence <= math.log(2) + 1e-12
    assert float(jensen_shannon(q, p)) == pytest.approx(divergence)
    assert float(jensen_shannon(p, p)) == pytest.approx(0, abs=1e-12)


def test_jensen_shannon_of_what_never_meets_is_log_2() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert float(jensen_shannon(p, q)) == pytest.approx(math.log(2))


def test_every_term_is_the_mean_over_the_batch_and_the_sum_over_classes() -> None:
    z, log_p, y = some_logits()
    p = log_p.exp()
    worker_options: list[Callable[[slice], Tensor]] = [
        lambda i: kl(p[i], z[i].log_softmax(dim=1)),
        lambda i: kd_term(z[i], log_p[i], 4.0),
        lambda i: kd(z[i], log_p[i], y[i], 4.0, 0.9),
        lambda i: soft_cross_entropy(z[i], p[i]),
        lambda i: jensen_shannon(p[i], z[i].softmax(dim=1)),
    ]
    for term in worker_options:
        torch.testing.assert_close(term(slice(None)), torch.stack([term(slice(i, i + 1)) for i in range(8)]).mean())


def test_soft_cross_entropy_with_certain_answers_is_cross_entropy() -> None:
    z, _, y = some_logits()
    torch.testing.assert_close(soft_cross_entropy(z, F.one_hot(y, 5).float()), F.cross_entropy(z, y))


# Precision


def test_training_in_bf16_keeps_fp32_weights_and_learns_as_well(data: Split) -> None:
    ctx = replace(context(data, epochs=8), precision="bf16")
    model = ctx.new_student()
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    held_out = blobs().validation
    assert (predict_logits(model, held_out.x).argmax(1) == held_out.y).float().mean() > 0.9
    in_fp32 = context(data, epochs=8)
    other = in_fp32.new_student()
    fit(other, F.cross_entropy, data.x, data.y, in_fp32)
    assert not same(state(model), state(other))  # it did compute otherwise


def test_losses_get_fp32_in_bf16(data: Split) -> None:
    seen = set()

    def loss(z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        answers, y = target
        seen.update({z.dtype, answers.dtype})
        return F.cross_entropy(z, y)

    ctx = replace(context(data), precision="bf16")
    teacher = ctx.new_student()
    fit(ctx.new_student(), loss, data.x, (teacher, data.y), ctx)
    assert seen == {torch.float32}


# The frozen form


def teacher(data: Split, precision: Precision = "fp32") -> tuple[nn.Module, Context]:
    ctx = replace(context(data, epochs=2), precision=precision)
    model = ctx.new_student("mini-16")
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    return model, ctx


@pytest.mark.parametrize(("precision", "room"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_what_is_frozen_answers_as_the_model_in_eval_mode(data: Split, precision: Precision, room: float) -> None:
    model, ctx = teacher(data, precision)
    expected = predict_logits(model, data.x)
    before = state(model.train())
    answers = inference(model, ctx)(data.x)
    assert answers.dtype == torch.float32
    assert not answers.requires_grad
    assert 0 < (answers - expected).abs().max() <= room * expected.abs().max()
    assert model.training
    assert same(state(model), before)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_what_is_frozen_does_not_follow_the_model(data: Split) -> None:
    model, ctx = teacher(data)
    ask = inference(model, ctx)
    before = ask(data.x)
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    assert torch.equal(ask(data.x), before)


def test_a_model_can_be_frozen_by_who_owns_no_images(data: Split) -> None:
    model, ctx = teacher(data)
    nobody = replace(ctx, data=data.take(torch.arange(0)))
    torch.testing.assert_close(inference(model, nobody)(data.x), predict_logits(model, data.x), rtol=1e-4, atol=1e-4)


# The profile


class Timing(Log):
    """Remembers what was timed."""

    def __init__(self, profiling: bool) -> None:
        super().__init__()
        self.profiling = profiling
        self.told: list[tuple[int, float, float | None]] = []

    def timed(self, images: int, seconds: float, limit: float | None) -> None:
        self.told.append((images, seconds, limit))


def test_a_profile_tells_how_far_from_its_limit_a_fit_is_and_changes_nothing(data: Split) -> None:
    weights, logs = [], []
    for profiling in (False, True):
        ctx = replace(context(data, epochs=3), log=Timing(profiling))
        model = network()
        noisy = torch.rand(len(data), generator=ctx.generator)  # a loss may draw from the generator, too

        def loss(z: Tensor, target: tuple[Tensor, Tensor], ctx: Context = ctx) -> Tensor:
            y, weight = target
            return F.cross_entropy(z, y) + weight.mean() * torch.rand((), generator=ctx.generator)

        fit(model, loss, data.x, (data.y, noisy), ctx)
        fit(model, F.cross_entropy, data.x, data.y, ctx)
        weights.append(state(model))
        logs.append(ctx.log)
    assert same(*weights)
    for log in logs:
        assert isinstance(log, Timing)
        assert [images for images, _, _ in log.told] == [3 * len(data)] * 2
        assert all(seconds > 0 for _, seconds, _ in log.told)
        assert all((limit is not None and limit > 0) == log.profiling for _, _, limit in log.told)


# Compilation


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(data: Split) -> None:
    """Needs a C++ compiler, as torch.compile does on a CPU."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    nets = []
    for compile_ in (False, True):
        ctx = replace(context(data, epochs=1), compile=compile_)
        ask = inference(ctx.new_student("mini-16").eval(), ctx)
        model = ctx.new_student()
        fit(model, kd_loss(4, 0.9, labelled=True), data.x, (ask, data.y), ctx)
        nets.append(model)
    for ours, theirs in zip(*(net.state_dict().values() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
