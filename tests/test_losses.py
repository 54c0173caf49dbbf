"""The losses that methods share: gradients, limits, and means over the batch."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdbench.api import jensen_shannon, kd, kd_term, kl, soft_cross_entropy, soften

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


def test_without_labels_the_loss_is_the_distillation_term_alone() -> None:
    z, log_p, y = some_logits()
    assert kd(z, log_p, None, 4.0, 0.9) == kd_term(z, log_p, 4.0)
    torch.testing.assert_close(kd(z, log_p, y, 4.0, 0.0), F.cross_entropy(z, y))
    torch.testing.assert_close(kd(z, log_p, y, 4.0, 1.0), kd_term(z, log_p, 4.0))


@given(pair=PAIRS, T=st.floats(0.5, 50), shift=FLOATS)
def test_softening_ignores_an_added_constant_so_log_probabilities_serve_as_logits(
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


def test_jensen_shannon_of_disjoint_distributions_is_log_2() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert float(jensen_shannon(p, q)) == pytest.approx(math.log(2))


def test_every_term_is_the_mean_over_the_batch_and_the_sum_over_classes() -> None:
    z, log_p, y = some_logits()
    p = log_p.exp()
    terms: list[Callable[[slice], Tensor]] = [
        lambda i: kl(p[i], z[i].log_softmax(dim=1)),
        lambda i: kd_term(z[i], log_p[i], 4.0),
        lambda i: kd(z[i], log_p[i], y[i], 4.0, 0.9),
        lambda i: soft_cross_entropy(z[i], p[i]),
        lambda i: jensen_shannon(p[i], z[i].softmax(dim=1)),
    ]
    for term in terms:
        torch.testing.assert_close(term(slice(None)), torch.stack([term(slice(i, i + 1)) for i in range(8)]).mean())


def test_soft_cross_entropy_with_certain_answers_is_cross_entropy() -> None:
    z, _, y = some_logits()
    torch.testing.assert_close(soft_cross_entropy(z, F.one_hot(y, 5).float()), F.cross_entropy(z, y))
