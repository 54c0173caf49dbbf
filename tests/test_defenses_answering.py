"""Defenses that act on answers: their laws, label only, top-k, rounding, reverse sigmoid."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import T, blobs, context, equal, generator, near, taught
from kdbench.api import (
    Defense,
    KdbenchError,
    Oracle,
    Scenario,
    Split,
    soften,
)
from kdbench.attacks.hard_label import HardLabel
from kdbench.defenses.gaussian_noise import GaussianNoise
from kdbench.defenses.label_only import LabelOnly
from kdbench.defenses.reverse_sigmoid import ReverseSigmoid, log_odds
from kdbench.defenses.rounding import Rounding
from kdbench.defenses.top_k import TopK

AT_ANSWERING = [
    LabelOnly(),
    TopK(2),
    Rounding(1),
    Rounding(3),
    ReverseSigmoid(),
    ReverseSigmoid(beta=0.008, gamma=0.2),
    ReverseSigmoid(beta=5.0, gamma=2.0),
    GaussianNoise(),
    GaussianNoise(2.0),
]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1)


def rows(classes: int, count: int = 64, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(5))


def served(defense: Defense, z: Tensor, seed: int = 0) -> Tensor:
    """The answers (N,K) of a model whose logits are `z`: an "image" is its logits."""
    only_classes_matter = Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), z.shape[1])
    return defense.serve(nn.Flatten(), context(only_classes_matter, seed=seed))(z[:, :, None, None])


# All of them


@pytest.mark.parametrize("defense", AT_ANSWERING, ids=repr)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_answers_are_distributions_whatever_the_logits(defense: Defense, classes: int) -> None:
    certain = torch.full((2, classes), -torch.inf)
    certain[:, -1] = 0.0
    certain[1, 0] = 0.0
    tied = torch.zeros(1, classes)
    answers = served(defense, torch.cat([rows(classes), rows(classes, scale=1e4), certain, tied]))
    assert not answers.isnan().any()
    assert answers.max() <= 1e-6
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(len(answers)))


@pytest.mark.parametrize("defense", AT_ANSWERING, ids=repr)
def test_an_answer_depends_on_its_image_alone(defense: Defense) -> None:
    z = rows(10)
    order = torch.randperm(len(z), generator=generator(1))
    together = served(defense, z)
    alone = torch.cat([served(defense, row[None]) for row in z])
    assert torch.equal(served(defense, z[order]), together[order])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)  # vectorised arithmetic rounds otherwise


@pytest.mark.parametrize("defense", AT_ANSWERING, ids=repr)
def test_a_defense_at_answering_deploys_the_victim_itself(defense: Defense, victim: nn.Module, data: Split) -> None:
    assert defense.harden(victim, context(data)) is victim


@pytest.mark.parametrize("defense", [LabelOnly(), TopK(1), TopK(2), TopK(50)], ids=repr)
def test_the_label_stays_where_that_is_promised(defense: Defense) -> None:
    ties = torch.randint(3, (200, 10), generator=generator(2)).float()
    for z in (rows(10, count=500), ties):
        assert torch.equal(served(defense, z).argmax(dim=1), z.argmax(dim=1))


@pytest.mark.parametrize("defense", [LabelOnly(), TopK(2)], ids=repr)
def test_the_hard_label_attacker_gets_the_same_student_as_from_no_defense(
    defense: Defense, victim: nn.Module, data: Split
) -> None:
    met, unmet = (
        HardLabel().steal(Oracle(one.serve(victim, context(data)), Scenario(), victim), context(data))
        for one in (defense, Defense())
    )
    assert equal(met, unmet)


# Label only, top-k


def test_label_only_answers_one_hot() -> None:
    z = rows(10)
    assert torch.equal(served(LabelOnly(), z).exp(), F.one_hot(z.argmax(dim=1), 10).float())


@pytest.mark.parametrize(("k", "revealed"), [(1, 1), (3, 3), (9, 9), (10, 10), (99, 10)])
def test_top_k_reveals_so_many_classes_ties_or_not(k: int, revealed: int) -> None:
    z = torch.cat([rows(10), torch.zeros(1, 10), rows(10).round()])
    shown = served(TopK(k), z).isfinite()
    assert (shown.sum(dim=1) == revealed).all()
    least = torch.where(shown, z, torch.inf).amin(dim=1)
    assert (torch.where(shown, -torch.inf, z).amax(dim=1) <= least).all()


def test_top_k_renormalises_what_it_reveals() -> None:
    near(soften(served(TopK(2), T), 1.0), [[0.880797, 0.119203, 0, 0]], digits=6)
    near(soften(served(TopK(2), T), 20.0), [[0.524979, 0.475021, 0, 0]], digits=6)
    torch.testing.assert_close(served(TopK(2), T + 7), served(TopK(2), T))


def test_top_k_of_all_is_no_defense_and_of_one_is_label_only() -> None:
    z = rows(10)
    torch.testing.assert_close(served(TopK(10), z), served(Defense(), z))
    assert torch.equal(served(TopK(1), z), served(LabelOnly(), z))


def test_top_k_needs_a_class() -> None:
    with pytest.raises(KdbenchError, match=r"k.*greater than or equal to 1"):
        TopK(0)


# Rounding


def test_rounding_rounds_and_renormalises() -> None:
    p = torch.tensor([[0.64, 0.27, 0.06, 0.03], [0.96, 0.02, 0.01, 0.01]])
    near(served(Rounding(1), p.log()).exp(), [[6 / 10, 3 / 10, 1 / 10, 0], [1, 0, 0, 0]], digits=6)
    near(served(Rounding(1), torch.tensor([[0.36, 0.36, 0.28]]).log()).exp(), [[4 / 11, 4 / 11, 3 / 11]], digits=6)


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_rounded_answers_are_whole_numbers_of_the_last_decimal(decimals: int) -> None:
    z = rows(10)
    p = served(Rounding(decimals), z).exp()
    step = 10.0**-decimals
    total = (z.softmax(dim=1) / step).round().sum(dim=1, keepdim=True)  # what the answers were divided by
    counts = p * total
    assert (counts - counts.round()).abs().max() < 1e-3
    assert (counts * step - z.softmax(dim=1)).abs().max() <= 0.5 * step + 1e-6


def test_a_row_that_rounds_to_nothing_is_answered_by_its_label() -> None:
    z = torch.zeros(2, 100)
    z[:, 7] = 0.1
    assert torch.equal(served(Rounding(1), z).exp(), F.one_hot(torch.tensor([7, 7]), 100).float())


def test_more_decimals_than_there_are_change_nothing() -> None:
    z = rows(10)
    for decimals in (7, 60):
        near(served(Rounding(decimals), z).exp(), z.softmax(dim=1).double(), digits=6)


# Reverse sigmoid


@pytest.mark.parametrize(
    ("beta", "gamma", "expected"),
    [
        (1.0, 0.1, [0.657125, 0.135688, 0.098390, 0.108798]),
        (0.5, 0.2, [0.662639, 0.136338, 0.097661, 0.103362]),
    ],
)
def test_reverse_sigmoid_gives_the_published_numbers(beta: float, gamma: float, expected: list[float]) -> None:
    near(served(ReverseSigmoid(beta, gamma), T).exp(), [expected], digits=6)


def test_reverse_sigmoid_takes_from_the_winner_and_keeps_it_unless_beta_is_large() -> None:
    z = rows(10, count=500)
    p, mild, harsh = (served(d, z).exp() for d in (Defense(), ReverseSigmoid(), ReverseSigmoid(beta=5.0, gamma=2.0)))
    sure = p.amax(dim=1) > 0.6
    assert (mild.amax(dim=1) < p.amax(dim=1))[sure].all()
    assert torch.equal(mild.argmax(dim=1)[sure], p.argmax(dim=1)[sure])
    assert not torch.equal(harsh.argmax(dim=1)[sure], p.argmax(dim=1)[sure])


def test_a_weak_reverse_sigmoid_is_nearly_no_defense() -> None:
    z = rows(10)
    torch.testing.assert_close(served(ReverseSigmoid(beta=1e-6), z).exp(), z.softmax(dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lead", [5.0, 20.0, 40.0, 80.0])
def test_the_odds_of_sure_answers_are_right_in_single_precision(lead: float) -> None:
    z = torch.tensor([[0.0, lead, 1.0, -lead]])
    exact = z.double()
    expected = exact - torch.stack([others.logsumexp(dim=1) for others in without_each(exact)], dim=1)
    torch.testing.assert_close(log_odds(z.log_softmax(dim=1)), expected.float(), rtol=1e-5, atol=1e-5)
    near(served(ReverseSigmoid(), z).exp(), served(ReverseSigmoid(), exact).exp(), digits=6)


def without_each(z: Tensor) -> list[Tensor]:
    return [torch.cat([z[:, :k], z[:, k + 1 :]], dim=1) for k in range(z.shape[1])]
