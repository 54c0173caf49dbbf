"""ModelGuard: Tang et al., "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks", USENIX
Security 2024."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.api import Context, Defense, NonNegative, Service, inference

from ._ball import keep_argmax, room, truth

OFFSET = 1e-6  # added to a probability before its logarithm is taken, as the code does
MARGIN = 1e-4  # by which the label leads, as in the code
GRID, ROUNDS = 8, 20  # the winner's share is searched for in so many parts, so many times: to 1e-12
SAME = 1e-9  # closer than this, two probabilities are the same


@dataclass(frozen=True)
class ModelGuardW(Defense):
    """Moves each answer, as far as epsilon lets it and the label stays, to where it says least about the truth.

    min sum_i y'_i log(y_i + 1e-6) such that |y' - y|_1 <= epsilon, y' is on the simplex, and the label's share is above
    all others by 1e-4. This linear programme of each answer is solved without a solver. Default: the code's epsilon.
    Departures: rounding's part is taken off epsilon (2e-6); an answer that epsilon does not let lead by so much (a tie,
    and a tiny epsilon) stays as it is; there is no budget shared by a batch, which the code has as an option.
    """

    epsilon: NonNegative = 1.0

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask = inference(model, ctx)
        return lambda x: self.perturbed(ask(x))

    def perturbed(self, z: Tensor) -> Tensor:
        """Log-probabilities of y' (N,K) from logits `z` (N,K)."""
        top = z.argmax(dim=1, keepdim=True)
        return keep_argmax(least_telling(truth(z), top, room(self.epsilon)).log().to(z.dtype), top)


@dataclass(frozen=True)
class ModelGuardS(Defense):
    """Answers with what it has answered before: of the answers given for a label, the first within epsilon (L1).

    An answer far from all of them is given as it is, and remembered. So a thief sees few different answers; whoever
    repeats a question gets the same one, but which it is depends on who was answered before. The ordered variant of the
    code, with its default epsilon. It starts with no memory, which lasts as long as the service and has no bound.
    Departure: rounding's part is taken off epsilon (2e-6).
    """

    stateful: ClassVar[bool] = True

    epsilon: NonNegative = 1.0

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask, quantiser = inference(model, ctx), Quantiser(room(self.epsilon))

        def service(x: Tensor) -> Tensor:
            z = ask(x)
            top = z.argmax(dim=1, keepdim=True)
            return keep_argmax(quantiser(truth(z), top).log().to(z.dtype), top)

        return service


class Quantiser:
    """Remembers answers in the order in which they came; stands one in for all of its label within `radius` (L1)."""

    def __init__(self, radius: float) -> None:
        self.radius = radius
        self.answers, self.labels = torch.empty(0), torch.empty(0)

    def __call__(self, y: Tensor, top: Tensor) -> Tensor:
        """What stands in for answers `y` (N,K) with labels `top` (N,1), as if they came one by one."""
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
        """The places (N,) of the first answers near enough from `start` on; where there is none, that after the last."""
        near = torch.cdist(y, self.answers[start:], p=1) <= self.radius
        near &= top == self.labels[start:].T
        return start + (near.cumsum(dim=1) == 0).sum(dim=1)


def least_telling(y: Tensor, top: Tensor, epsilon: float) -> Tensor:
    """y' (N,K), ModelGuard-W's answers for `y` (N,K) in float64 with labels `top` (N,1)."""
    order = y.scatter(1, top, torch.inf).argsort(dim=1, stable=True)
    y = y.gather(1, order)
    programme = Programme(y[:, :-1], y[:, -1:], epsilon)
    low, high = programme.winners()
    others = programme.others(lowest(programme.cost, low, high))
    solved = torch.cat([others, 1 - others.sum(dim=1, keepdim=True)], dim=1)
    return torch.zeros_like(y).scatter(1, order, torch.where(low <= high, solved, y))


class Programme:
    """ModelGuard-W's linear programme for answers that give a `winner` (N,1) so much and `rest` (N,K-1), ascending.

    When the winner's new share t is fixed, the others' are found by a greedy exchange: a class is better the less likely
    it was, so that the least likely ones are filled up to t - MARGIN, one after the other, out of the most likely ones,
    which are emptied one after the other, until these meet those or epsilon is spent. The least cost for given t is a
    convex function of t, as that of every linear programme is of one of its variables.
    """

    def __init__(self, rest: Tensor, winner: Tensor, epsilon: float) -> None:
        self.rest, self.winner, self.half_width = rest, winner, epsilon / 2
        self._costs, self._cost = (rest + OFFSET).log(), (winner + OFFSET).log()
        self._rank = torch.arange(rest.shape[1], device=rest.device)

    def winners(self) -> tuple[Tensor, Tensor]:
        """From where (N,1) to where (N,1) the winner's share may be; nowhere if the first is larger."""
        count = self.rest.shape[1] + 1
        # At its least, all that lies above it, and for the others above it less the margin, is cut off and is epsilon / 2.
        above = torch.cat([self.rest + MARGIN, self.winner], dim=1).sort(dim=1, descending=True).values
        parts = torch.arange(1, count + 1, device=above.device)
        cut = ((above.cumsum(dim=1) - self.half_width) / parts).amax(dim=1, keepdim=True)
        full = (1 + (count - 1) * MARGIN) / count  # all others just below it
        return cut.clamp_min(full), (self.winner + self.half_width).clamp_max(1)

    def cost(self, t: Tensor) -> Tensor:
        """The objective (...,N,1) for winner's shares `t` (...,N,1)."""
        return (self._costs * self.shares(t)).sum(dim=-1, keepdim=True) + self._cost * t

    def shares(self, t: Tensor) -> Tensor:
        """The best shares (...,N,K-1) of the others for winner's shares `t` (...,N,1)."""
        most, gain = t - MARGIN, t - self.winner
        filled = torch.minimum((1 - t - most * self._rank).clamp_min(0), most)  # with no heed to epsilon
        spent = ((filled - self.rest).abs().sum(dim=-1, keepdim=True) + gain.abs()) / 2
        spent = spent.clamp_max(self.half_width)
        cut = torch.minimum(self.rest, most)
        given = spent - gain.clamp_min(0)
        taken = spent - (-gain).clamp_min(0) - (self.rest - cut).sum(dim=-1, keepdim=True)
        return cut + first(most - cut, given) - first(cut.flip(-1), taken).flip(-1)

    def others(self, t: Tensor) -> Tensor:
        """The shares for given `t`, where the search for `t` left them not quite at their old value or at 0."""
        shares = self.shares(t)
        shares = torch.where((shares - self.rest).abs() < SAME, self.rest, shares)
        return shares.where((shares > SAME) | (shares == self.rest), 0)


def first(places: Tensor, amount: Tensor) -> Tensor:
    """An `amount` (...,1) handed out to `places` (...,K) in their order, each up to its size."""
    return torch.minimum(places.cumsum(dim=-1), amount.clamp_min(0)).diff(dim=-1, prepend=torch.zeros_like(amount))


def lowest(cost: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where between `low` and `high` (N,1) a convex `cost` of (...,N,1) is least."""
    steps = torch.arange(GRID + 1, device=low.device)[:, None, None] / GRID
    for _ in range(ROUNDS):
        grid = low + (high - low) * steps
        best = cost(grid[1:-1]).argmin(dim=0, keepdim=True)
        low, high = grid.gather(0, best)[0], grid.gather(0, best + 2)[0]
    return (low + high) / 2
