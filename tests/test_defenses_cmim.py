"""CMIM: the information that is left in a class."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import S, T, accuracy, blobs, context, equal, generator, near, taught
from kdbench.api import (
    Split,
    jensen_shannon,
    predict_logits,
)
from kdbench.defenses.cmim import CMIM, information
from kdbench.zoo.datasets import Blobs


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1)


def rows(classes: int, count: int = 64, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(5))


def test_a_class_with_one_answer_carries_no_information() -> None:
    y = torch.tensor([0, 0, 0, 1, 1])
    z = rows(4, count=2).double()[y]
    near(information(z, y), 0.0, digits=12)
    near(information(z + torch.arange(5.0)[:, None], y), 0.0, digits=12)
    assert information(rows(4, count=5), y) > 0.1


def test_the_information_of_a_pair_is_twice_their_jensen_shannon_divergence() -> None:
    pair = torch.cat([S, T])
    expected = 2 * jensen_shannon(S.softmax(dim=1), T.softmax(dim=1))  # 2 / (2 - 1)
    near(information(pair, torch.tensor([3, 3])), expected, digits=12)
    # Another class, of one image, adds nothing to the sum over three.
    near(information(torch.cat([pair, rows(4, count=1)]), torch.tensor([3, 3, 0])), expected * 2 / 3, digits=6)


def test_small_batches_estimate_the_information_of_the_whole() -> None:
    z = 0.3 * torch.randn(3000, 4, dtype=torch.float64, generator=generator(6))
    whole = information(z, torch.zeros(3000, dtype=torch.int64))
    for size in (2, 3, 10):
        batches = [information(part, torch.zeros(size, dtype=torch.int64)) for part in z.split(size)]
        assert float(torch.stack(batches).mean()) == pytest.approx(float(whole), rel=0.05)


def test_cmim_adds_the_information_at_every_temperature_to_the_cross_entropy() -> None:
    z, y = rows(4).double(), torch.arange(64) % 4
    loss = CMIM(weight=0.5, temperatures=(1.0, 4.0)).loss(z, y)
    near(loss, F.cross_entropy(z, y) + 0.5 * (information(z, y) + information(z / 4, y)), digits=12)
    for bare in (CMIM(weight=0.0), CMIM(temperatures=())):
        near(bare.loss(z, y), F.cross_entropy(z, y), digits=12)


def test_cmim_has_finite_gradients_where_answers_are_one_hot() -> None:
    z = (1e4 * F.one_hot(torch.arange(12) % 3, 3).float()).requires_grad_()
    CMIM().loss(z, torch.arange(12) // 4).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_cmim_makes_a_class_answer_alike_and_keeps_the_labels() -> None:
    images = Blobs(images=300, noise=0.4).load(Path())
    data, test = images.train, images.test
    seeds = range(3)
    victims = [taught(data, epochs=12, seed=seed) for seed in seeds]
    hardened = [CMIM().harden(nn.Identity(), context(data, epochs=12, seed=seed)) for seed in seeds]

    def left(nets: list[nn.Module], temperature: float) -> float:
        return sum(float(information(predict_logits(net, test.x) / temperature, test.y)) for net in nets)

    assert left(hardened, 1.0) < left(victims, 1.0)
    for temperature in (4.0, 16.0):
        assert left(hardened, temperature) < 0.75 * left(victims, temperature)
    assert sum(accuracy(net, test) for net in hardened) >= sum(accuracy(net, test) for net in victims) - 3 * 0.02


def test_cmim_tells_how_much_information_is_left(victim: nn.Module, data: Split) -> None:
    ctx = context(data)
    hardened = CMIM().harden(victim, ctx)
    near(torch.tensor(ctx.log.numbers["information"]), information(predict_logits(hardened, data.x), data.y), digits=6)


def test_cmim_without_weight_is_plain_training(victim: nn.Module, data: Split) -> None:
    hardened = CMIM(weight=0.0).harden(victim, context(data))
    assert equal(hardened, taught(data))
    assert not equal(CMIM().harden(victim, context(data)), hardened)
