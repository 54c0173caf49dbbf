"""ModelGuard: the linear programme against a solver, and the quantiser against one that is asked one by one."""

from typing import Any

import numpy
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from helpers import blobs, context, generator, taught
from kdbench.api import Defense, Split, predict_logits
from kdbench.defenses.model_guard import MARGIN, ModelGuardS, ModelGuardW, least_informative


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1)


def rows(classes: int, count: int = 64, scale: float = 3.0, seed: int = 5) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(seed))


def split_of(classes: int) -> Split:
    """A split of which only the number of classes matters."""
    return Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), classes)


def l1(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().sum(dim=1)


def polytope(y: Tensor, epsilon: float) -> tuple[list[numpy.ndarray], list[numpy.ndarray]]:
    """|y' - y|_1 <= epsilon for a solver: rows and bounds in the variables y' (K) and the moves (K)."""
    eye, zero, one = numpy.eye(len(y)), numpy.zeros((1, len(y))), numpy.ones((1, len(y)))
    rows = [numpy.hstack([eye, -eye]), numpy.hstack([-eye, -eye]), numpy.hstack([zero, one])]
    return rows, [y.numpy(), -y.numpy(), numpy.array([epsilon])]


def solved(costs: Tensor, rows: list[numpy.ndarray], bounds: list[numpy.ndarray]) -> Any:
    """The least of costs . y' on the simplex under `rows` <= `bounds`, by scipy."""
    zero, one = numpy.zeros(len(costs)), numpy.ones(len(costs))
    objective, simplex = numpy.concatenate([costs.numpy(), zero]), numpy.concatenate([one, zero])[None]
    limits, most, total = numpy.vstack(rows), numpy.concatenate(bounds), numpy.ones(1)
    exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    return linprog(objective, limits, most, simplex, total, options=exact)  # type: ignore[call-overload]


def problems(classes: int) -> Tensor:
    z = [rows(classes, 6, scale).double() for scale in (0.1, 1.0, 3.0, 10.0)]
    return torch.cat([*z, z[1].round(), 1e4 * torch.eye(classes)[:2], torch.zeros(1, classes)]).softmax(dim=1)


# ModelGuard-W


@pytest.mark.parametrize("classes", [2, 3, 10, 30])
@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.3, 1.0, 1.7, 2.0])
def test_the_least_informative_answer_is_the_solution_of_the_linear_programme(classes: int, epsilon: float) -> None:
    y = problems(classes)
    top = y.argmax(dim=1, keepdim=True)
    guarded = least_informative(y, top, epsilon)
    lead = guarded.gather(1, top) - guarded.scatter(1, top, -1.0).amax(dim=1, keepdim=True)
    assert (guarded >= 0).all()
    torch.testing.assert_close(guarded.sum(1), torch.ones(len(y)).double())
    assert l1(guarded, y).max() <= epsilon + 1e-8
    assert lead.min() >= MARGIN - 1e-8
    for n in range(len(y)):
        costs = (y[n] + 1e-6).log()
        limits, bounds = polytope(y[n], epsilon)
        others = numpy.delete(numpy.eye(classes) - numpy.eye(classes)[int(top[n])], int(top[n]), axis=0)
        limits.append(numpy.hstack([others, numpy.zeros_like(others)]))
        best = solved(costs, limits, [*bounds, numpy.full(classes - 1, -MARGIN)])
        assert best.status == 0
        assert float(costs @ guarded[n]) == pytest.approx(best.fun, abs=1e-7)


@pytest.mark.parametrize(
    ("y", "epsilon", "expected"),
    [
        ([0.9, 0.1, 0.0], 0.4, [0.7, 0.1, 0.2]),
        ([0.9, 0.1, 0.0], 1.2, [0.5 + MARGIN / 2, 0.0, 0.5 - MARGIN / 2]),
        ([0.34, 0.33, 0.33, 0.0], 2.0, [0.5 + MARGIN / 2, 0.0, 0.0, 0.5 - MARGIN / 2]),
        ([1.0, 0.0, 0.0, 0.0], 0.6, None),
        ([0.5, 0.5, 0.0], 2 * MARGIN, [0.5, 0.5 - MARGIN, MARGIN]),
    ],
)
def test_answers_guarded_by_hand(y: list[float], epsilon: float, expected: list[float] | None) -> None:
    truth = torch.tensor([y], dtype=torch.float64)
    guarded = least_informative(truth, truth.argmax(1, True), epsilon)
    if expected is None:  # of equal classes any may be filled; the winner pays
        torch.testing.assert_close(guarded[0, 0], truth[0, 0] - epsilon / 2)
    else:
        torch.testing.assert_close(guarded, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-8)


def test_classes_are_emptied_left_or_filled_and_hardly_any_in_between() -> None:
    z = rows(10, 300)
    y, top = z.double().softmax(1), z.argmax(1, True)
    guarded = least_informative(y, top, 0.8)
    most = guarded.gather(1, top) - MARGIN
    plain = (guarded == 0) | (guarded == y) | ((guarded - most).abs() < 1e-8)
    assert (plain.scatter(1, top, True).logical_not().sum(1) <= 2).all()
    assert ((guarded == 0) | (guarded > 1e-9) | (guarded == y)).all()


def test_an_answer_that_cannot_get_the_lead_it_needs_stays() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [3.0, 1.0, 0.0]])
    y = z.double().softmax(1)
    guarded = least_informative(y, z.argmax(1, True), 2e-5)
    assert torch.equal(guarded[:2], y[:2])
    assert not torch.equal(guarded[2], y[2])


def test_guarded_answers_are_less_sure(victim: nn.Module, data: Split) -> None:
    truth = predict_logits(victim, data.x).softmax(1)
    guarded = ModelGuardW().serve(victim, context(data))(data.x).exp()
    assert torch.special.entr(guarded).sum(1).mean() > 3 * torch.special.entr(truth).sum(1).mean()


def one_by_one(y: Tensor, top: Tensor, epsilon: float) -> tuple[Tensor, int]:
    """The paper's ordered quantiser as it is told: the answers (N,K), and how many of them were new."""
    memory: dict[int, list[Tensor]] = {}
    said = []
    for row, label in zip(y, top[:, 0].tolist(), strict=True):
        known = memory.setdefault(label, [])
        near = [old for old in known if (old - row).abs().sum() <= epsilon]
        if not near:
            known.append(row)
        said.append(near[0] if near else row)
    return torch.stack(said), sum(map(len, memory.values()))


# ModelGuard-S


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0, 1.9])
@pytest.mark.parametrize("batch", [1, 7, 400])
def test_the_quantiser_answers_as_if_asked_one_by_one(classes: int, epsilon: float, batch: int) -> None:
    z = torch.cat([rows(classes, 200), rows(classes, 200, scale=1.0)])[torch.randperm(400, generator=generator(1))]
    service = ModelGuardS(epsilon).serve(nn.Flatten(), context(split_of(classes)))
    said = torch.cat([service(part[:, :, None, None]) for part in z.split(batch)])
    expected, new = one_by_one(z.double().softmax(1), z.argmax(1, True), epsilon - 2e-6)
    torch.testing.assert_close(said.double().exp(), expected, rtol=0, atol=1e-6)
    assert len({tuple(row) for row in said.tolist()}) == new


def asked(defense: Defense, parts: list[Tensor]) -> list[Tensor]:
    service = defense.serve(nn.Flatten(), context(split_of(parts[0].shape[1])))
    return [service(part[:, :, None, None]).exp() for part in parts]


def test_the_first_near_enough_answers_and_not_the_nearest() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.72, 0.28], [0.4, 0.6]])
    (said,) = asked(ModelGuardS(0.5), [p.log()])
    torch.testing.assert_close(said, p[[0, 1, 0, 3]])  # the second is 0.6 from the first, the last has another label


def test_the_quantiser_remembers_and_a_new_service_does_not() -> None:
    p = torch.tensor([[0.9, 0.1], [0.72, 0.28]])
    first, second = asked(ModelGuardS(0.5), [p[:1].log(), p[1:].log()])
    torch.testing.assert_close(torch.cat([first, second]), p[[0, 0]])
    (alone,) = asked(ModelGuardS(0.5), [p[1:].log()])
    torch.testing.assert_close(alone, p[1:])


def test_who_repeats_a_question_gets_the_same_answer() -> None:
    z = rows(10, 200)
    first, _, again = asked(ModelGuardS(0.3), [z, rows(10, 500, seed=8), z])
    assert torch.equal(first, again)


def test_different_answers_for_a_label_lie_further_apart_than_epsilon() -> None:
    (said,) = asked(ModelGuardS(0.5), [rows(5, 500)])
    different = said.unique(dim=0).double()
    far = torch.cdist(different, different, p=1) > 0.5 - 3e-6
    same_label = different.argmax(1)[:, None] == different.argmax(1)
    assert (far | ~same_label | torch.eye(len(different)).bool()).all()
    assert 5 < len(different) < 100


def test_an_attacker_sees_few_answers(victim: nn.Module, data: Split) -> None:
    service = ModelGuardS().serve(victim, context(data))
    assert len(service(data.x).unique(dim=0)) <= 9
    assert ModelGuardS.stateful
    assert not ModelGuardW.stateful
