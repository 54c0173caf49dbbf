"""Gradient redirection: against a solver, its derivatives, and its surrogate."""

from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

from helpers import blobs, context, generator, taught
from kdbench.api import Context, Log, Split, kl, predict_logits
from kdbench.defenses.gradient_redirection import GradientRedirection, moved, rises


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1)


def rows(classes: int, count: int = 64, scale: float = 3.0, seed: int = 5) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(seed))


def l1(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().sum(dim=1)


class Watched:
    """A context that shows the networks it has handed out."""

    def __init__(self, ctx: Context) -> None:
        self.networks: list[nn.Module] = []

        def new_student(name: str | None = None) -> nn.Module:
            self.networks.append(ctx.new_student(name))
            return self.networks[-1]

        self.ctx = replace(ctx, new_student=new_student)


def jacobian(log_p: Tensor, weights: list[Tensor]) -> Tensor:
    """The gradients (K,D) of the log-probabilities (1,K) of one image, class by class."""
    grads = [torch.autograd.grad(value, weights, retain_graph=True) for value in log_p[0]]
    return torch.stack([torch.cat([part.flatten() for part in grad]) for grad in grads]).double()


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


@pytest.mark.parametrize("classes", [2, 3, 10, 30])
@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.5, 1.0, 1.7, 2.0])
def test_the_greedy_redirection_is_the_solution_of_the_linear_programme(classes: int, epsilon: float) -> None:
    y, rise = problems(classes), rows(classes, len(problems(classes)), seed=9).double()
    rise[::3] = rise[::3].round()
    redirected = moved(y, rise, epsilon / 2)
    assert (redirected >= 0).all()
    torch.testing.assert_close(redirected.sum(1), torch.ones(len(y)).double())
    assert l1(redirected, y).max() <= epsilon + 1e-12
    for n in range(len(y)):
        best = -solved(-rise[n], *polytope(y[n], epsilon)).fun
        assert float(rise[n] @ redirected[n]) == pytest.approx(best, abs=1e-8)


def test_redirection_empties_the_worst_classes_into_the_best() -> None:
    y = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    for rise, movable, expected in [
        ([0.0, 1.0, 2.0], 0.4, [0.1, 0.3, 0.6]),
        ([1.0, 0.0, 2.0], 0.4, [0.4, 0.0, 0.6]),
        ([9.0, 0.0, 0.0], 0.4, [0.9, 0.0, 0.1]),
        ([9.0, 0.0, 0.0], 1.0, [1.0, 0.0, 0.0]),
    ]:
        wanted = torch.tensor([expected], dtype=torch.float64)
        torch.testing.assert_close(moved(y, torch.tensor([rise]), movable), wanted, rtol=0, atol=1e-15)


def test_an_emptied_class_is_withheld_and_not_nearly_so() -> None:
    z, rise = rows(10, 300), rows(10, 300, seed=9)
    left = moved(z.double().softmax(1), rise, 0.5)
    worst, best = rise.argmin(1, keepdim=True), rise.argmax(1, keepdim=True)
    assert (left > 0).any(dim=1).all()
    assert ((left.gather(1, worst) == 0) | (l1(left, z.double().softmax(1))[:, None] > 1 - 1e-9)).all()
    assert ((left == 0) | (left > 1e-12)).all()
    assert (left.gather(1, best) >= z.double().softmax(1).gather(1, best)).all()


@pytest.mark.parametrize("name", ["mini-8", "preresnet-20", "shufflenetv2", "takd-plane-2", "wrn-16-1"])
def test_the_rises_are_sums_over_the_gradients_of_all_weights(name: str) -> None:
    size = 8 if name == "mini-8" else 32
    net = context(Split(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64), 4), model=name).new_student()
    net.eval().requires_grad_(False)
    x = torch.rand(3, 3, size, size, generator=generator(1))
    rise = rises(net, x)
    net.requires_grad_(True)
    for n in range(3):
        G = jacobian(net(x[n : n + 1]).log_softmax(dim=1), list(net.parameters()))
        expected = G.sum(dim=1)
        tolerance = 1e-4 * float(G.abs().sum(dim=1).max())  # sums of up to a million float32 numbers of both signs
        torch.testing.assert_close(rise[n].double(), expected, rtol=1e-3, atol=tolerance)


def test_no_answer_of_its_own_moves_the_surrogate(data: Split) -> None:
    net = context(data).new_student().eval().requires_grad_(False)
    rise = rises(net, data.x)
    torch.testing.assert_close(
        (predict_logits(net, data.x).softmax(1) * rise).sum(1), torch.zeros(96), rtol=0, atol=1e-4
    )
    assert rise.abs().max() > 0.1


def test_a_redirected_attacker_raises_its_weights(victim: nn.Module, data: Split) -> None:
    watched = Watched(context(data, epochs=12))
    service = GradientRedirection().serve(victim, watched.ctx)
    (surrogate,) = watched.networks
    truth = predict_logits(victim, data.x).log_softmax(1)

    def rise(log_p: Tensor) -> float:
        """By how much a step of gradient descent on the answers moves the sum of all weights."""
        surrogate.requires_grad_(True)
        loss = F.cross_entropy(surrogate(data.x), log_p.exp())
        grads = torch.autograd.grad(loss, list(surrogate.parameters()))
        surrogate.requires_grad_(False)
        return -float(sum(part.sum() for part in grads))

    noise = rows(3, 96).softmax(1)
    noisy = truth.exp() + 0.999 / l1(noise, truth.exp()).clamp_min(1)[:, None] * (noise - truth.exp())
    redirected = service(data.x)
    rise_per_answer = rises(surrogate, data.x)
    assert rise(redirected) == pytest.approx(float((rise_per_answer * redirected.exp()).sum(1).mean()), abs=1e-3)
    assert rise(redirected) > max(rise(truth), rise(noisy.log())) + 0.1


class Progress(Log):
    """Counts the epochs it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = 0

    def progress(self, share: float, text: str) -> None:
        self.epochs += 1


@pytest.mark.parametrize("epochs", [1, 10])
def test_the_surrogate_learns_the_victims_answers_for_so_many_epochs(
    epochs: int, victim: nn.Module, data: Split
) -> None:
    log = Progress()
    watched = Watched(replace(context(data, epochs=40), log=log))
    GradientRedirection(epochs=epochs).serve(victim, watched.ctx)
    (surrogate,) = watched.networks
    assert log.epochs == epochs
    far = kl(predict_logits(victim, data.x).softmax(1), predict_logits(surrogate, data.x).log_softmax(1))
    assert (far < 0.2) == (epochs == 10)
