"""Stingy: what it reveals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import S, T, Y, blobs, context, near, taught
from kdbench.api import (
    Defense,
    Split,
    kd,
    kd_term,
    soften,
)
from kdbench.defenses.stingy import Stingy


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    net = taught(data, epochs=12, seed=1)
    net.zero_grad()  # what a gradient later shows is not of its own training
    return net


def split_of(classes: int) -> Split:
    """A split of which only the number of classes matters."""
    return Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), classes)


def served(defense: Defense, z: Tensor) -> Tensor:
    """The answers (N,K) of a model whose logits are `z`: an "image" is its logits."""
    return defense.serve(nn.Flatten(), context(split_of(z.shape[1])))(z[:, :, None, None])


def rows(classes: int, count: int = 64) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(5))


def test_stingy_target_has_the_papers_numbers_at_both_temperatures() -> None:
    answers = served(Stingy(ratio=0.5), T)
    near(soften(answers, 20.0), [[0.524979, 0.475021, 0.0, 0.0]], digits=6)
    near(soften(answers, 1.0), [[0.880797, 0.119203, 0.0, 0.0]], digits=6)


def test_stingy_costs_a_student_what_the_paper_says() -> None:
    answers = served(Stingy(ratio=0.5), T)
    near(kd_term(S, answers, 20.0), 261.340200628)
    near(kd(S, answers, Y, 20.0, 0.9), 235.355698755)


@pytest.mark.parametrize(("ratio", "classes", "revealed"), [(0.2, 10, 2), (0.1, 100, 10), (0.1, 200, 20), (0.1, 3, 1)])
def test_stingy_reveals_as_many_classes_as_the_paper(ratio: float, classes: int, revealed: int) -> None:
    assert Stingy(ratio=ratio).revealed(classes) == revealed


def test_stingy_is_not_deceived_by_the_rounding_of_the_ratio() -> None:
    assert [Stingy(ratio=n / 100).revealed(100) for n in range(1, 101)] == list(range(1, 101))


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.35, 0.999, 1.0])
def test_stingy_support_is_exact_sums_to_one_and_keeps_the_label(ratio: float) -> None:
    z = rows(10)
    answers = served(Stingy(ratio=ratio), z)
    assert (answers.isfinite().sum(dim=1) == Stingy(ratio=ratio).revealed(10)).all()
    assert not answers.isnan().any()
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(len(z)))
    assert torch.equal(answers.argmax(dim=1), z.argmax(dim=1))


@pytest.mark.parametrize("hidden", ["minus-infinity", "zero"])
def test_stingy_answers_ties_without_enlarging_the_support(hidden: str) -> None:
    answers = served(Stingy(ratio=0.4, hidden=hidden), torch.ones(3, 5))  # type: ignore[arg-type]
    assert (answers.exp() > 0.2 + 1e-3).sum(dim=1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("hidden", ["minus-infinity", "zero"])
def test_of_equal_classes_stingy_reveals_the_first_and_so_keeps_the_label(hidden: str) -> None:
    z = torch.rand(64, 10).sort(dim=1).values[:, torch.randperm(10)].clamp_max(0.5) + 1
    answers = served(Stingy(ratio=0.1, hidden=hidden), z)  # type: ignore[arg-type]
    assert torch.equal(answers.argmax(dim=1), z.argmax(dim=1))


def test_stingy_ignores_a_constant_added_to_all_logits() -> None:
    z = rows(10).double()
    torch.testing.assert_close(served(Stingy(), z + 7), served(Stingy(), z))


def test_stingy_with_all_classes_is_no_defense() -> None:
    z = rows(10)
    torch.testing.assert_close(served(Stingy(ratio=1.0), z), z.log_softmax(dim=1))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_stingy_with_one_class_is_the_label_at_any_temperature(temperature: float) -> None:
    z = rows(10)
    one_hot = F.one_hot(z.argmax(dim=1), 10).float()
    assert torch.equal(soften(served(Stingy(ratio=0.1), z), temperature), one_hot)


def test_stingy_with_zeros_softens_the_logits_with_zeros_in_place_of_the_hidden_ones() -> None:
    answers = served(Stingy(ratio=0.5, hidden="zero"), S)
    torch.testing.assert_close(soften(answers, 4.0), soften(torch.tensor([[1.0, 2.0, 0.0, 0.0]]).double(), 4.0))
    risen = served(Stingy(ratio=0.5, hidden="zero"), -1 - T.abs())
    assert risen.argmax(dim=1).item() not in T.abs().topk(2, largest=False).indices


def test_stingy_deploys_the_victim_itself(victim: nn.Module, data: Split) -> None:
    assert Stingy().harden(victim, context(data)) is victim
