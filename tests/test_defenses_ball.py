"""Defenses that move answers within an L1 ball: the ball, the label, and what students learn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import blobs, context, generator, taught
from kdbench.api import Defense, Oracle, Scenario, Service, Split, kl, predict_logits
from kdbench.attacks.hard_label import HardLabel
from kdbench.attacks.kd import KD
from kdbench.defenses.gradient_redirection import GradientRedirection
from kdbench.defenses.mad import MAD
from kdbench.defenses.model_guard import ModelGuardS, ModelGuardW

CLASSES = [2, 3, 10, 11, 100]


EPSILONS = [0.01, 0.3, 1.0, 1.9]


KEEPING: list[Defense] = [MAD(), ModelGuardW(), ModelGuardS()]


FREE: list[Defense] = [MAD(keep_argmax=False), GradientRedirection()]


ALL = [*KEEPING, *FREE]


IMAGE_ALONE = [defense for defense in ALL if not defense.stateful]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1)


def rows(classes: int, count: int = 64, scale: float = 3.0, seed: int = 5) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(seed))


def logits(classes: int) -> Tensor:
    """Rows of all kinds: drawn, sure of themselves, certain, with ties, and with what float32 hardly tells apart."""
    certain = torch.full((2, classes), -torch.inf)
    certain[:, -1] = 0.0
    certain[1, 0] = 0.0
    ties = torch.randint(3, (64, classes), generator=generator(2)).float()
    hairline = torch.full((classes, classes), 1e-3)
    hairline.diagonal().copy_(torch.nextafter(hairline.diagonal(), torch.tensor(1.0)))
    drawn = [rows(classes), rows(classes, scale=0.01), rows(classes, scale=30.0), rows(classes, scale=1e4)]
    return torch.cat([*drawn, certain, ties, torch.zeros(1, classes), hairline])


def split_of(classes: int) -> Split:
    """A split of which only the number of classes matters."""
    return Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), classes)


def answers(defense: Any, z: Tensor, seed: int = 0) -> Tensor:
    """The answers (N,K) to images for which the victim has logits `z`, and the surrogate something made up."""
    made_up = rows(z.shape[1], len(z), scale=1.0, seed=seed).double()
    if isinstance(defense, MAD):
        return defense.turned(z.log_softmax(dim=1), made_up.softmax(dim=1))
    if isinstance(defense, GradientRedirection):
        return defense.redirected(z.log_softmax(dim=1), made_up.float())
    service: Service = defense.serve(nn.Flatten(), context(split_of(z.shape[1])))  # an "image" is its logits
    return service(z[:, :, None, None])


def l1(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().sum(dim=1)


@pytest.mark.parametrize("defense", ALL, ids=repr)
@pytest.mark.parametrize("classes", CLASSES)
def test_answers_are_distributions_whatever_the_logits(defense: Defense, classes: int) -> None:
    z = logits(classes)
    log_p = answers(defense, z)
    assert log_p.dtype == z.dtype
    assert not log_p.isnan().any()
    assert log_p.max() <= 0
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(len(z)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("defense", ALL, ids=repr)
@pytest.mark.parametrize("classes", [*CLASSES, 1000])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_budget_is_kept_to_the_last_bit(defense: Any, classes: int, epsilon: float) -> None:
    z = logits(classes) if classes < 1000 else torch.cat([rows(1000), rows(1000, scale=0.01)])
    log_p = answers(replace(defense, epsilon=epsilon), z)
    assert l1(log_p.double().exp(), z.double().softmax(dim=1)).max() <= epsilon
    assert l1(log_p.exp(), z.softmax(dim=1)).max() <= epsilon


@pytest.mark.parametrize("defense", KEEPING, ids=repr)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, *EPSILONS, 2.0])
def test_the_label_stays_where_that_is_promised(defense: Any, classes: int, epsilon: float) -> None:
    z = logits(classes)
    log_p = answers(replace(defense, epsilon=epsilon), z)
    assert torch.equal(log_p.argmax(dim=1), z.log_softmax(dim=1).argmax(dim=1))  # of what would be answered without it
    assert ((log_p == log_p.amax(dim=1, keepdim=True)).sum(dim=1) == 1).all()  # and nobody can take it for a tie


@pytest.mark.parametrize("defense", FREE, ids=repr)
def test_the_label_goes_where_it_may(defense: Defense) -> None:
    z = rows(10)
    assert not torch.equal(answers(defense, z).argmax(dim=1), z.argmax(dim=1))


@pytest.mark.parametrize("defense", ALL, ids=repr)
@pytest.mark.parametrize("classes", CLASSES)
def test_without_a_budget_there_is_no_defense(defense: Any, classes: int) -> None:
    z = logits(classes)
    unmoved = answers(replace(defense, epsilon=0.0), z).exp()
    torch.testing.assert_close(unmoved, z.softmax(dim=1), rtol=1e-5, atol=1e-6)
    assert l1(answers(defense, rows(10)).exp(), rows(10).softmax(dim=1)).mean() > 0.05


@pytest.mark.parametrize("defense", IMAGE_ALONE, ids=repr)
@pytest.mark.parametrize("classes", [3, 10, 11])
def test_an_answer_depends_on_its_logits_alone(defense: Defense, classes: int) -> None:
    z = logits(classes)

    def asked(part: Tensor, made_up: Tensor) -> Tensor:
        if isinstance(defense, MAD):
            return defense.turned(part.log_softmax(dim=1), made_up.softmax(dim=1))
        if isinstance(defense, GradientRedirection):
            return defense.redirected(part.log_softmax(dim=1), made_up)
        return answers(defense, part)

    # Ties on both sides: where nothing else decides, the order of the classes has to.
    made_up = torch.cat([rows(classes, len(z) - 40), torch.zeros(40, classes)]).double()
    together, order = asked(z, made_up), torch.randperm(len(z), generator=generator(1))
    assert torch.equal(asked(z[order], made_up[order]), together[order])
    alone = torch.cat([asked(z[n : n + 1], made_up[n : n + 1]) for n in range(len(z))])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("defense", IMAGE_ALONE, ids=repr)
def test_an_image_gets_its_answer_in_whatever_batch(defense: Defense, victim: nn.Module, data: Split) -> None:
    service = defense.serve(victim, context(data))
    together, order = service(data.x), torch.randperm(len(data), generator=generator(1))
    assert l1(service(data.x[order]).exp(), together[order].exp()).max() < 1e-4
    alone = torch.cat([service(image[None]) for image in data.x])
    assert l1(alone.exp(), together.exp()).max() < 1e-4


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_they_deploy_the_victim_itself_and_leave_it_as_it_is(defense: Defense, victim: nn.Module, data: Split) -> None:
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    assert defense.harden(victim, context(data)) is victim
    defense.serve(victim, context(data))(data.x)
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_low_precision_is_the_networks_not_the_answers(defense: Any, victim: nn.Module, data: Split) -> None:
    ctx = replace(context(data), precision="bf16")
    log_p = defense.serve(victim, ctx)(data.x)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(len(data)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_nobody_asking_gets_no_answer(defense: Defense, victim: nn.Module, data: Split) -> None:
    assert defense.serve(victim, context(data))(data.x[:0]).shape == (0, 3)


@pytest.mark.parametrize("defense", KEEPING, ids=repr)
def test_the_hard_label_attacker_gets_the_same_student_as_from_no_defense(
    defense: Defense, victim: nn.Module, data: Split
) -> None:
    met, unmet = (
        HardLabel().steal(Oracle(one.serve(victim, context(data)), Scenario(), victim), context(data))
        for one in (defense, Defense())
    )
    theirs = unmet.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in met.state_dict().items())


def distance_of_student(defense: Defense, victim: nn.Module, data: Split, seed: int) -> float:
    """How far (KL, on test images) a student that learns nothing but the answers is from the victim."""
    oracle = Oracle(defense.serve(victim, context(data, epochs=12)), Scenario(), victim)
    attacker = KD(temperature=1.0, alpha=1.0).steal(oracle, context(data.without_labels(), epochs=12, seed=seed))
    x = blobs().test.x
    return float(kl(predict_logits(victim, x).softmax(dim=1), predict_logits(attacker, x).log_softmax(dim=1)))


@pytest.mark.parametrize(
    ("defense", "factor"),
    [(MAD(keep_argmax=False), 5), (MAD(), 5), (GradientRedirection(), 2), (ModelGuardW(), 5)],
    ids=repr,
)
def test_who_learns_from_the_answers_learns_less_of_the_victim(
    defense: Defense, factor: float, victim: nn.Module, data: Split
) -> None:
    """Summed over three seeds: how far the undefended student comes in 12 epochs depends on its initial weights."""
    behind, undefended = (
        sum(distance_of_student(one, victim, data, seed) for seed in (6, 7, 8)) for one in (defense, Defense())
    )
    assert behind > factor * undefended


def asked(defense: Defense, parts: list[Tensor]) -> list[Tensor]:
    service = defense.serve(nn.Flatten(), context(split_of(parts[0].shape[1])))
    return [service(part[:, :, None, None]).exp() for part in parts]
