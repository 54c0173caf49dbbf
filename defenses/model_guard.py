"""ModelGuard: Tang et al., "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks", USENIX
Security 2024."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.api import Context, Defense, NonNegative, Service, inference

from ._ball import clean_probabilities, float_safe, keep_argmax

OFFSET = 1e-6  # added to a probability before its logarithm is taken, as the code does
MARGIN = 1e-4  # by how much the label leads, as in the code
GRID, REFINEMENTS = 8, 20  # the label's probability is searched on a grid that is refined so often: to 1e-12
SAME = 1e-9  # closer than this, two probabilities are the same


@dataclass(frozen=True)
class ModelGuardW(Defense):
    """Moves each answer within an L1 ball to where it tells least about the clean probabilities, and keeps the label.

    min sum_i y'_i log(y_i + 1e-6) such that |y' - y|_1 <= epsilon, y' is on the simplex, and the label's probability is
    above all others by 1e-4. The linear programme of each answer is solved without a solver. Default: the code's epsilon.
    Departures: what rounding may add is taken off epsilon (2e-6). An answer whose label cannot lead by so much (a tie, and
    a tiny epsilon) stays unchanged. There is no budget shared by a batch, which the code has as an option.
    """

    epsilon: NonNegative = 1.0

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        top = log_p.argmax(dim=1, keepdim=True)
        y = least_informative(clean_probabilities(log_p), top, float_safe(self.epsilon))
        return keep_argmax(y.log().to(log_p.dtype), top)


@dataclass(frozen=True)
class ModelGuardS(Defense):
    """Repeats earlier answers: of the answers given for a label so far, the first within epsilon (L1).

    An answer far from all of them is given unchanged, and remembered. So an attacker sees few different answers. A
    repeated question gets the same answer, but which one it is depends on the questions before it. This is the ordered
    variant of the code, with its default epsilon. The memory starts empty, lasts as long as the service and has no bound.
    Departure: what rounding may add is taken off epsilon (2e-6).
    """

    stateful: ClassVar[bool] = True

    epsilon: NonNegative = 1.0

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask, quantiser = inference(model, ctx), Quantiser(float_safe(self.epsilon))

        def service(x: Tensor) -> Tensor:
            log_p = ask(x).log_softmax(dim=1)
            top = log_p.argmax(dim=1, keepdim=True)
            return keep_argmax(quantiser(clean_probabilities(log_p), top).log().to(log_p.dtype), top)

        return service


class Quantiser:
    """Remembers answers in order; an answer is replaced by the first one of its label within `radius` (L1)."""

    def __init__(self, radius: float) -> None:
        self.radius = radius
        self.answers, self.labels = torch.empty(0), torch.empty(0)

    def __call__(self, y: Tensor, top: Tensor) -> Tensor:
        """The remembered answers that replace `y` (N,K) with labels `top` (N,1), as if these came one by one."""
        if not len(self.answers):
            self.answers, self.labels = y[:0], top[:0]
        place = self._first(y, top, 0)
        while len(new := (place == len(self.answers)).nonzero()):
            self.answers = torch.cat([self.answers, y[new[0]]])
            self.labels = torch.cat([self.labels, top[new[0]]])
            last = len(self.answers) - 1
            place = torch.where(place < last, place, self._first(y, top, last))
        return self.answers[place]

    def _first(self, y: Tensor, top: Tensor, start: int) -> Tensor:
        """The places (N,) from `start` on of the first answers near enough; the place after the last where none is."""
        near = torch.cdist(y, self.answers[start:], p=1) <= self.radius
        near &= top == self.labels[start:].T
        return start + (near.cumsum(dim=1) == 0).sum(dim=1)


def least_informative(y: Tensor, top: Tensor, epsilon: float) -> Tensor:
    """y' (N,K), ModelGuard-W's answers for `y` (N,K) in float64 with labels `top` (N,1)."""
    order = y.scatter(1, top, torch.inf).argsort(dim=1, stable=True)
    y = y.gather(1, order)
    programme = Programme(y[:, :-1], y[:, -1:], epsilon)
    low, high = programme.winners()
    others = programme.others(lowest(programme.cost, low, high))
    solved = torch.cat([others, 1 - others.sum(dim=1, keepdim=True)], dim=1)
    return torch.zeros_like(y).scatter(1, order, torch.where(low <= high, solved, y))


class Programme:
    """ModelGuard-W's linear programme for answers whose label has probability `winner` (N,1), the others `rest` (N,K-1).

    `rest` is ascending. When the label's new probability t is fixed, the others are found by a greedy exchange, since a
    class costs less the less likely it was. The least likely ones are filled up to t - MARGIN, one after the other; the
    most likely ones are emptied, one after the other. This ends where the two meet or epsilon is spent. The least cost for
    given t is a convex function of t, as the optimum of every linear programme is in one of its variables.
    """

    def __init__(self, rest: Tensor, winner: Tensor, epsilon: float) -> None:
        self.rest, self.winner, self.movable = rest, winner, epsilon / 2
        self._costs, self._cost = (rest + OFFSET).log(), (winner + OFFSET).log()
        self._rank = torch.arange(rest.shape[1], device=rest.device)

    def winners(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest probability (N,1) the label may have; there is none if the first is larger."""
        count = self.rest.shape[1] + 1
        # At the least one, what other classes have above it less the margin, and the label above it, sums to epsilon / 2.
        above = torch.cat([self.rest + MARGIN, self.winner], dim=1).sort(dim=1, descending=True).values
        parts = torch.arange(1, count + 1, device=above.device)
        cut = ((above.cumsum(dim=1) - self.movable) / parts).amax(dim=1, keepdim=True)
        full = (1 + (count - 1) * MARGIN) / count  # all others just below it
        return cut.clamp_min(full), (self.winner + self.movable).clamp_max(1)

    def cost(self, t: Tensor) -> Tensor:
        """The objective (...,N,1) when the label has probability `t` (...,N,1)."""
        return (self._costs * self.shares(t)).sum(dim=-1, keepdim=True) + self._cost * t

    def shares(self, t: Tensor) -> Tensor:
        """The best probabilities (...,N,K-1) of the others when the label has `t` (...,N,1)."""
        most, gain = t - MARGIN, t - self.winner
        filled = torch.minimum((1 - t - most * self._rank).clamp_min(0), most)  # ignoring epsilon
        spent = ((filled - self.rest).abs().sum(dim=-1, keepdim=True) + gain.abs()) / 2
        spent = spent.clamp_max(self.movable)
        cut = torch.minimum(self.rest, most)
        given = spent - gain.clamp_min(0)
        taken = spent - (-gain).clamp_min(0) - (self.rest - cut).sum(dim=-1, keepdim=True)
        return cut + first(most - cut, given) - first(cut.flip(-1), taken).flip(-1)

    def others(self, t: Tensor) -> Tensor:
        """As `shares`, with values that the search for `t` left almost at their old value or at 0 put exactly there."""
        shares = self.shares(t)
        shares = torch.where((shares - self.rest).abs() < SAME, self.rest, shares)
        return shares.where((shares > SAME) | (shares == self.rest), 0)


def first(places: Tensor, amount: Tensor) -> Tensor:
    """An `amount` (...,1) distributed over `places` (...,K) in their order, each up to its size."""
    return torch.minimum(places.cumsum(dim=-1), amount.clamp_min(0)).diff(dim=-1, prepend=torch.zeros_like(amount))


def lowest(cost: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The minimiser (N,1) between `low` and `high` (N,1) of a convex `cost` of (...,N,1), by a grid that is refined."""
    steps = torch.arange(GRID + 1, device=low.device)[:, None, None] / GRID
    for _ in range(REFINEMENTS):
        grid = low + (high - low) * steps
        best = cost(grid[1:-1]).argmin(dim=0, keepdim=True)
        low, high = grid.gather(0, best)[0], grid.gather(0, best + 2)[0]
    return (low + high) / 2
