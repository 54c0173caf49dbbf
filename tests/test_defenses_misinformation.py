"""Adaptive misinformation: its mixture, its outliers, and whom it misinforms."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import S, T, accuracy, blobs, context, generator, near, taught
from kdbench.api import (
    UNKNOWN,
    Defense,
    Oracle,
    Scenario,
    Split,
    predict_logits,
)
from kdbench.attacks.kd import KD
from kdbench.defenses.adaptive_misinformation import AdaptiveMisinformation, outliers, reversed_cross_entropy


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1)


def rows(classes: int, count: int = 64, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(5))


@pytest.mark.parametrize(("top", "expected"), [(0.8, 1.0), (0.9, 0.5), (0.901, 0.268941)])
def test_the_share_of_misinformation_is_the_published_one(top: float, expected: float) -> None:
    p = torch.tensor([[top, 1 - top]], dtype=torch.float64)
    wrong = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    defense = AdaptiveMisinformation(threshold=0.9, nu=1000.0)
    near(defense.mixed(p.log(), wrong.log()).exp()[:, 0] / top, [1 - expected], digits=6)


def test_mixtures_of_clean_and_wrong_answers_are_distributions() -> None:
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    log_p, log_f = (
        torch.cat([rows(3, 64).log_softmax(1), certain]),
        torch.cat([certain, rows(3, 64).log_softmax(1)]),
    )
    for defense in (AdaptiveMisinformation(), AdaptiveMisinformation(nu=5.0), AdaptiveMisinformation(threshold=1.0)):
        mixed = defense.mixed(log_p, log_f)
        assert not mixed.isnan().any()
        torch.testing.assert_close(mixed.exp().sum(dim=1), torch.ones(65))


def test_the_misinformation_model_learns_from_the_reversed_cross_entropy() -> None:
    y = torch.tensor([0])
    near(reversed_cross_entropy(S, y), -(1 - S.softmax(dim=1)[0, 0]).log(), digits=12)
    sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    reversed_cross_entropy(sure, y).backward()  # the code's 1 - softmax has no digits left here
    assert sure.grad is not None
    near(sure.grad, [[1.0, -0.5, -0.5]], digits=5)


def test_exposure_asks_for_uniform_answers_to_outliers() -> None:
    z, y = torch.cat([S, T, T, S]), torch.tensor([0, UNKNOWN, 1, UNKNOWN])
    uniform = torch.full((2, 4), 0.25, dtype=torch.float64)
    expected = F.cross_entropy(z[[0, 2]], y[[0, 2]]) + 0.3 * F.cross_entropy(z[[1, 3]], uniform)
    near(AdaptiveMisinformation(exposure=0.3).loss(z, y), expected, digits=12)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (28, 28)])
def test_outliers_are_the_images_with_their_bands_in_disorder(size: tuple[int, int], data: Split) -> None:
    x = torch.rand(300, 2, *size, generator=generator(8))
    ctx = context(replace(data, x=x, y=torch.zeros(300, dtype=torch.int64)))
    foreign_images = outliers(ctx)
    for channel in (0, 1):
        assert torch.equal(foreign_images[:, channel].flatten(1).sort().values, x[:, channel].flatten(1).sort().values)
    assert (foreign_images != x).flatten(1).any(dim=1).float().mean() > 0.97
    assert len({tuple(row) for row in (foreign_images - x).sign().flatten(1).tolist()}) > 100


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10)])
def test_a_band_of_an_outlier_stays_whole(height: int, width: int, data: Split) -> None:
    numbered = torch.arange(height * width).reshape(1, 1, height, width).expand(50, -1, -1, -1)
    ctx = context(replace(data, x=numbered.float(), y=torch.zeros(50, dtype=torch.int64)))
    foreign_images = outliers(ctx)[:, 0].long()
    row, column = foreign_images // width, foreign_images % width
    assert (row == row[:, :, :1]).all()
    assert (column == column[:, :1, :]).all()
    for order in (row[:, :, 0], column[:, 0, :]):
        assert (order.diff(dim=1) != 1).sum(dim=1).max() == 3  # four bands have three seams


def test_outliers_are_drawn_from_the_context(data: Split) -> None:
    assert torch.equal(outliers(context(data)), outliers(context(data)))
    assert not torch.equal(outliers(context(data, seed=1)), outliers(context(data)))


def test_adaptive_misinformation_without_exposure_deploys_the_victim(victim: nn.Module, data: Split) -> None:
    assert AdaptiveMisinformation(exposure=0.0).harden(victim, context(data)) is victim


UNSURE = AdaptiveMisinformation(threshold=0.7)  # of three classes, even a guess has a third


EPOCHS = 30


@pytest.fixture(scope="module")
def exposed(victim: nn.Module, data: Split) -> nn.Module:
    return UNSURE.harden(victim, context(data, epochs=EPOCHS)).requires_grad_(False)


def confidence(net: nn.Module, x: Tensor) -> Tensor:
    return predict_logits(net, x).softmax(dim=1).amax(dim=1)


def test_exposure_makes_a_victim_doubt_outliers_and_keeps_the_labels(exposed: nn.Module, victim: nn.Module) -> None:
    test = blobs().test
    foreign_images = outliers(context(test, seed=3))
    assert confidence(exposed, foreign_images).mean() < confidence(victim, foreign_images).mean() - 0.15
    assert confidence(exposed, test.x).mean() > 0.9
    assert accuracy(exposed, test) >= accuracy(victim, test) - 0.02


def test_ordinary_users_get_clean_answers_and_outliers_wrong_ones(exposed: nn.Module, data: Split) -> None:
    test = blobs().test
    foreign_images = outliers(context(test, seed=3))
    service = UNSURE.serve(exposed, context(data, epochs=EPOCHS))
    assert (service(test.x).argmax(dim=1) == test.y).float().mean() > 0.95
    sure = confidence(exposed, foreign_images) > 0.75
    assert 0 < sure.sum() < 0.5 * len(foreign_images)
    truth = predict_logits(exposed, foreign_images).log_softmax(dim=1)
    torch.testing.assert_close(service(foreign_images)[sure].exp(), truth[sure].exp(), rtol=0, atol=1e-4)
    assert (service(foreign_images).argmax(dim=1) != truth.argmax(dim=1))[~sure].float().mean() > 0.7


def test_the_misinformation_model_is_wrong_about_ordinary_images_too(exposed: nn.Module, data: Split) -> None:
    test = blobs().test
    service = replace(UNSURE, threshold=1.0).serve(exposed, context(data, epochs=EPOCHS))
    assert (service(test.x).argmax(dim=1) == test.y).float().mean() < 0.05


def test_an_attacker_with_foreign_images_learns_less_under_misinformation(exposed: nn.Module, data: Split) -> None:
    foreign = replace(data, x=outliers(context(data, seed=4))).without_labels()

    def student_accuracy(defense: Defense) -> float:
        oracle = Oracle(defense.serve(exposed, context(data, epochs=EPOCHS)), Scenario(), exposed)
        return accuracy(KD(alpha=1.0).steal(oracle, context(foreign, epochs=EPOCHS, seed=5)), blobs().test)

    assert student_accuracy(UNSURE) < student_accuracy(Defense()) - 0.2


def test_an_owner_reads_who_is_misinformed(victim: nn.Module, data: Split) -> None:
    ctx = context(data, epochs=EPOCHS)
    UNSURE.harden(victim, ctx)
    assert ctx.log.numbers["false_positive_rate"] < 0.1
    assert ctx.log.numbers["detection_rate"] > 0.5


def test_a_service_trains_its_misinformation_model_on_what_the_context_gives_alone(
    exposed: nn.Module, data: Split
) -> None:
    foreign_images = outliers(context(data, seed=3))
    first, again, other = (UNSURE.serve(exposed, context(data, seed=seed))(foreign_images) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
