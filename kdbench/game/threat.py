"""Who sees what: access levels, the scenario, and the oracle that enforces it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn

from kdbench.errors import Refused
from kdbench.game.fields import Checked, Count, Share

Service = Callable[[Tensor], Tensor]
"""Images (N,C,H,W) in [0,1] -> log-probabilities (N,K); -inf marks a withheld class."""

ANSWER_CHUNK = 1024  # images a service is handed at once; bounds memory, not the count


class Access(IntEnum):
    """What an attacker may see of the victim, ordered from least to most revealed."""

    NOTHING = 0
    LABEL = 1
    TOPK = 2
    PROBS = 3
    WEIGHTS = 4

    @classmethod
    def _missing_(cls, value: object) -> "Access | None":
        return next((a for a in cls if a.name.lower() == str(value).lower()), None)


@dataclass(frozen=True)
class Scenario(Checked):
    """Who the attacker is: what it may see of the victim, how much it may ask, which images it has.

    name: what boards call it; it decides nothing. access: what is revealed. topk: classes revealed at the access level
    TOPK. budget: images the oracle answers at most (None: no limit). data: fraction of the victim's training images
    that the attacker has, class-balanced, in [0,1]. labels: whether the attacker has their labels too.
    """

    name: str = "default"
    access: Access = Access.PROBS
    topk: Count = 5
    budget: Count | None = None
    data: Share = 1.0
    labels: bool = True


@dataclass
class QueryCounter:
    """How many images an oracle has answered. The engine keeps it, so that a resumed attack run does not start at 0."""

    answered: int = 0


class Oracle:
    """All that an attack gets of the victim: counts every answered image, reveals no more than the scenario allows.

    The service, the model and the rules are closed over, not stored. An attack that inspects the oracle finds none of
    them, and an attack that assigns another scenario to `oracle.scenario` changes nothing.
    """

    def __init__(
        self, service: Service, scenario: Scenario, model: nn.Module | None, counter: QueryCounter | None = None
    ) -> None:
        counter = counter or QueryCounter()
        inputs = InputCheck()

        def ask(x: Tensor) -> Tensor:
            if scenario.access is Access.NOTHING:
                raise Refused("asked the victim in a scenario that grants nothing")
            inputs.check(x)
            _check_budget(len(x), scenario.budget, counter)
            counter.answered += len(x)
            with torch.no_grad():
                answers = torch.cat([truncate(service(part), scenario) for part in x.split(ANSWER_CHUNK)])
            return answers.detach()

        def copy_model() -> nn.Module:
            if scenario.access is not Access.WEIGHTS:
                raise Refused(f"asked for the weights, but only {scenario.access.name.lower()} were granted")
            if model is None:
                raise Refused("asked for the weights of a victim whose network is not at hand")
            return copy.deepcopy(model).eval().requires_grad_(False)

        def count() -> int:
            inputs.raise_if_outside()
            return counter.answered

        self.scenario = scenario
        self._ask, self._copy_model, self._count = ask, copy_model, count

    def __call__(self, x: Tensor) -> Tensor:
        """Log-probabilities (N,K), truncated to the access level, for images `x` (N,C,H,W) in [0,1].

        Raises `Refused` before answering when the budget does not cover all of `x`, or nothing was granted.
        """
        return self._ask(x)

    @property
    def answered(self) -> int:
        """Images answered so far. Raises `Refused` when an accelerator was asked about pixels outside [0,1]."""
        return self._count()

    @property
    def left(self) -> int | None:
        """Images that the budget still covers; None: no limit."""
        return None if self.scenario.budget is None else self.scenario.budget - self.answered

    def model(self) -> nn.Module:
        """A frozen copy of the hardened model; raises `Refused` unless weights were granted."""
        return self._copy_model()


def truncate(log_p: Tensor, scenario: Scenario) -> Tensor:
    """Log-probabilities (N,K) cut down to what `scenario` reveals: all, the top k renormalised, or the top label alone."""
    if scenario.access is Access.LABEL:
        return keep_top(log_p, 1)
    if scenario.access is Access.TOPK:
        return keep_top(log_p, scenario.topk)
    return log_p


def keep_top(log_p: Tensor, n: int) -> Tensor:
    """Log-probabilities (N,K) with the `n` largest of each row renormalised and -inf for the rest.

    Classes are chosen by index, so that exactly `n` remain where some are equal: the first of them, as argmax has it.
    """
    values, order = log_p.sort(dim=1, descending=True, stable=True)
    kept = torch.full_like(log_p, -torch.inf).scatter(1, order[:, :n], values[:, :n])
    return kept.log_softmax(dim=1)


def _check_budget(images: int, budget: int | None, counter: QueryCounter) -> None:
    if budget is not None and counter.answered + images > budget:
        raise Refused(f"asked for {images} answers with {budget - counter.answered} of {budget} left")


class InputCheck:
    """Refuses whatever is not an image in [0,1].

    Tensors on the CPU are checked before they are answered. On an accelerator, reading the result of the check would
    make the host wait at every step, so it is recorded there, and read when `raise_if_outside` is called.
    """

    def __init__(self) -> None:
        self._outside: Tensor | None = None

    def check(self, x: Tensor) -> None:
        """Raises `Refused` for what is no float tensor (N,C,H,W), and for pixels on the CPU outside [0,1]."""
        if x.ndim != 4 or not x.is_floating_point():
            raise Refused(f"an oracle answers float images (N,C,H,W), not {tuple(x.shape)} of {x.dtype}")
        if len(x):
            self.record(~((x.amin() >= 0) & (x.amax() <= 1)))  # true for NaN
            if x.device.type == "cpu":
                self.raise_if_outside()

    def record(self, outside: Tensor) -> None:
        """Remember whether pixels lay `outside` [0,1], a truth value () on any device."""
        self._outside = outside if self._outside is None else self._outside | outside

    def raise_if_outside(self) -> None:
        """Raises `Refused` once if any pixels recorded since the last call lay outside [0,1]."""
        outside, self._outside = self._outside, None
        if outside is not None and outside:
            raise Refused("an oracle answers images in [0,1]; these reach outside")
