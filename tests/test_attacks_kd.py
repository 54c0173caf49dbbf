"""KD, its variants and the baselines: the papers' formulas as numbers, who asks what and how often."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import S, T, Y, accuracy, blobs, context, equal, remembering, taught, undefended
from kdbench.api import (
    Access,
    Attack,
    Context,
    DataSubset,
    KdbenchError,
    Oracle,
    QueryFunction,
    Scenario,
    Split,
    predict_logits,
    soften,
)
from kdbench.attacks import assistant_kd
from kdbench.attacks.assistant_kd import AssistantKD
from kdbench.attacks.cross_entropy import CrossEntropy
from kdbench.attacks.hard_label import HardLabel
from kdbench.attacks.kd import KD, distil, kd_loss
from kdbench.attacks.label_smoothing import LabelSmoothing
from kdbench.attacks.partial_kd import PartialKD
from kdbench.zoo.datasets import Blobs

EPOCHS, IMAGES = 2, 96


BASELINES = [CrossEntropy(), LabelSmoothing()]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


def oracle_on(model: nn.Module, access: Access = Access.WEIGHTS, budget: int | None = None) -> Oracle:
    return Oracle(undefended(model), Scenario(access=access, budget=budget), model)


def attacker(attack: Attack, data: Split, seed: int = 0) -> Context:
    """The attacker's side, with the part of `data` that `attack` uses."""
    return context(attack.data_subset().of(data), EPOCHS, seed)


def name(attack: Attack) -> str:
    kind = "Adaptive" if getattr(attack, "competition", 0) else ""
    return f"{kind}{type(attack).__name__}-{getattr(attack, 'queries', '')}"


# Formulas


def test_the_kd_loss_is_that_of_the_papers() -> None:
    loss = kd_loss(4.0, 0.9, labelled=True)
    assert float(loss(S, (T, Y))) == pytest.approx(0.998680543, abs=1e-8)
    assert float(kd_loss(4.0, 0.9, labelled=False)(S, (T, Y))) == pytest.approx(0.943513726, abs=1e-8)


def test_the_kd_term_is_summed_over_classes_and_not_averaged() -> None:
    weighted = 0.9 * float(kd_loss(4.0, 1.0, labelled=True)(S, (T, Y)))
    assert weighted == pytest.approx(0.849162353, abs=1e-8)
    assert weighted / 4 == pytest.approx(0.212290588, abs=1e-8)  # what reduction="mean" would make of it


def test_answers_as_log_probabilities_give_the_loss_of_the_logits() -> None:
    loss = kd_loss(4.0, 0.9, labelled=True)
    assert float(loss(S, (T.log_softmax(dim=1), Y))) == pytest.approx(float(loss(S, (T, Y))), abs=1e-12)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn() -> None:
    z = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = kd_loss(4.0, 1.0, labelled=True)(z, (z.detach(), torch.zeros(5, dtype=torch.long)))
    (gradient,) = torch.autograd.grad(value, z)
    assert abs(float(value.detach())) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


def test_the_gradient_of_the_kd_loss_is_alpha_T_times_the_difference_of_softened_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    z.requires_grad_()
    y = torch.arange(6) % 4
    (gradient,) = torch.autograd.grad(kd_loss(4.0, 0.9, labelled=True)(z, (t, y)), z)
    hard = z.softmax(dim=1) - F.one_hot(y, 4)
    expected = (0.9 * 4.0 * (soften(z, 4.0) - soften(t, 4.0)) + (1 - 0.9) * hard) / 6
    torch.testing.assert_close(gradient, expected)


def test_answers_are_softened_by_dividing_logits() -> None:
    assert soften(T, 4.0)[0].tolist() == pytest.approx([0.422761, 0.256418, 0.199698, 0.121123], abs=1e-6)
    assert soften(S, 4.0)[0].tolist() == pytest.approx([0.265037, 0.340315, 0.233895, 0.160753], abs=1e-6)


def test_label_smoothing_is_cross_entropy_with_a_share_for_all_classes() -> None:
    log_p = S.log_softmax(dim=1)
    expected = 0.9 * 1.495181898 - 0.1 * float(log_p.mean())
    assert float(LabelSmoothing().loss(S, Y)) == pytest.approx(expected, abs=1e-8)


# Baselines


@pytest.mark.parametrize("baseline", BASELINES, ids=name)
def test_a_baseline_never_asks(baseline: Attack, data: Split, victim: nn.Module) -> None:
    asked: list[Tensor] = []
    oracle = Oracle(lambda x: asked.append(x) or predict_logits(victim, x), Scenario(access=Access.PROBS), victim)  # type: ignore[func-returns-value]
    baseline.steal(oracle, attacker(baseline, data))
    assert not asked
    assert oracle.answered == 0
    assert baseline.needs is Access.NOTHING


@pytest.mark.parametrize("baseline", BASELINES, ids=name)
def test_a_baseline_without_labels_says_so(baseline: Attack, data: Split, victim: nn.Module) -> None:
    with pytest.raises(KdbenchError, match="no labels to train on"):
        baseline.steal(oracle_on(victim), attacker(baseline, data.without_labels()))


@pytest.mark.parametrize("baseline", BASELINES, ids=name)
def test_a_baseline_without_images_says_so(baseline: Attack, data: Split, victim: nn.Module) -> None:
    with pytest.raises(KdbenchError, match="no images to train on"):
        baseline.steal(oracle_on(victim), context(DataSubset(fraction=0.0).of(data)))


def test_no_smoothing_is_cross_entropy(data: Split, victim: nn.Module) -> None:
    plain, smooth, none = (
        attack.steal(oracle_on(victim), attacker(attack, data))
        for attack in (CrossEntropy(), LabelSmoothing(), LabelSmoothing(smoothing=0.0))
    )
    assert equal(plain, none)
    assert not equal(plain, smooth)


# Who asks what, and how often


def test_a_last_batch_of_one_image_is_not_asked_about(victim: nn.Module) -> None:
    oracle = oracle_on(victim)
    KD().steal(oracle, context(Blobs(images=IMAGES + 1).load(Path()).train, EPOCHS))
    assert oracle.answered == EPOCHS * IMAGES


# The hard label


def test_the_hard_label_attacker_needs_nothing_but_labels(data: Split, victim: nn.Module) -> None:
    exact = HardLabel().steal(oracle_on(victim, Access.PROBS), attacker(HardLabel(), data))
    assert equal(exact, HardLabel().steal(oracle_on(victim, Access.LABEL), attacker(HardLabel(), data)))


def test_the_hard_label_attacker_is_blind_to_soft_values(data: Split, victim: nn.Module) -> None:
    def softer(x: Tensor) -> Tensor:
        return (predict_logits(victim, x) / 7).log_softmax(dim=1)

    same, other = (Oracle(service, Scenario(), victim) for service in (undefended(victim), softer))
    assert equal(HardLabel().steal(same, context(data)), HardLabel().steal(other, context(data)))
    assert not equal(KD().steal(same, context(data)), KD().steal(other, context(data)))


def test_the_hard_label_attacker_learns_the_victims_labels_and_not_the_true_ones(
    data: Split, victim: nn.Module
) -> None:
    def shifted(x: Tensor) -> Tensor:
        return undefended(victim)(x).roll(1, dims=1)

    student = HardLabel().steal(Oracle(shifted, Scenario(), victim), context(data, epochs=10))
    assert accuracy(student, replace(data, y=(data.y + 1) % 3)) > 0.9
    unlabelled = HardLabel().steal(Oracle(shifted, Scenario(), victim), context(data.without_labels(), epochs=10))
    assert equal(student, unlabelled)


# Part of the data


def test_partial_kd_owns_a_balanced_part(data: Split) -> None:
    attack = PartialKD(fraction=0.25, subset_seed=3)
    assert attack.data_subset() == DataSubset(0.25, 3)
    part = attack.data_subset().of(data)
    assert part.y.bincount().tolist() == [8, 8, 8]
    assert not torch.equal(part.x, PartialKD(fraction=0.25, subset_seed=4).data_subset().of(data).x)


def test_partial_kd_asks_about_its_part_alone(data: Split, victim: nn.Module) -> None:
    attack = PartialKD(fraction=0.25, queries="once")
    oracle = oracle_on(victim)
    attack.steal(oracle, attacker(attack, data))
    assert oracle.answered == IMAGES / 4


def test_partial_kd_with_all_data_is_kd(data: Split, victim: nn.Module) -> None:
    whole = PartialKD(fraction=1.0)
    assert equal(whole.steal(oracle_on(victim), attacker(whole, data)), KD().steal(oracle_on(victim), context(data)))


@pytest.mark.parametrize("fraction", [0.0, 1.1])
def test_partial_kd_refuses_a_part_that_is_none(fraction: float) -> None:
    with pytest.raises(KdbenchError, match=r"PartialKD\.fraction must be"):
        PartialKD(fraction=fraction)


# Assistants


def test_an_empty_chain_is_kd(data: Split, victim: nn.Module) -> None:
    students = [a.steal(oracle_on(victim), context(data)) for a in (AssistantKD(chain=()), KD(), AssistantKD())]
    assert equal(students[0], students[1])
    assert not equal(students[0], students[2])


@pytest.mark.parametrize(("queries", "asked"), [("once", IMAGES), ("augmented", EPOCHS * IMAGES)])
def test_only_the_first_hop_asks_the_oracle(queries: Any, asked: int, data: Split, victim: nn.Module) -> None:
    oracle = oracle_on(victim)
    AssistantKD(chain=("mini-16", "", ""), queries=queries).steal(oracle, context(data, EPOCHS))
    assert oracle.answered == asked


def test_the_chain_names_its_networks(data: Split, victim: nn.Module) -> None:
    attack = AssistantKD(chain=("mini-16", "", "mini-32"))
    ctx, made = remembering(context(data))
    attack.steal(oracle_on(victim), ctx)
    assert attack.networks() == ("mini-16", "mini-32")
    assert [net.classifier.in_features for net in made] == [16, 32, 16, 64]  # the student first


def test_an_assistant_teaches_what_it_learnt_and_learns_no_more(
    data: Split, victim: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops: list[tuple[nn.Module, QueryFunction, nn.Module]] = []

    def watched(student: nn.Module, teacher: Any, *rest: Any) -> None:
        distil(student, teacher, *rest)
        hops.append((student, teacher, copy.deepcopy(student)))

    monkeypatch.setattr(assistant_kd, "distil", watched)
    oracle = oracle_on(victim)
    student = AssistantKD(chain=("mini-16", "")).steal(oracle, context(data))
    assert hops[0][1] is oracle
    for (elder, _, _), (_, teacher, _) in itertools.pairwise(hops):
        torch.testing.assert_close(teacher(data.x), predict_logits(elder, data.x), rtol=1e-4, atol=1e-4)
    assert hops[-1][0] is student
    for net, _, then in hops:
        assert not net.training
        assert equal(net, then)
        assert all(p.grad is None for p in net.parameters())  # training clears its own
