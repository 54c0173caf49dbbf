"""Who sees what: the ladder of answers, the threat model, and the oracle that enforces it."""

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
    """What this attacker may see, ask and own.

    access: what is granted. topk: classes revealed under the TOPK grant. budget: images the oracle answers at most
    (None: no limit). data: share of the victim's training images that the attacker owns, class-balanced.
    labels: whether it owns their labels too.
    """

    access: Access = Access.PROBS
    topk: Count = 5
    budget: Count | None = None
    data: Share = 1.0
    labels: bool = True


@dataclass
class QueryCounter:
    """How many images an oracle has answered; the runner's, so that a resumed theft goes on counting where it was."""

    answered: int = 0


class Oracle:
    """All that an attack gets of the victim: counts every answered image, reveals no more than was granted.

    The service and the model are closed over, not stored: an attack that looks around in the oracle finds neither. So
    are the rules: writing another threat model into the oracle changes nothing.
    """

    def __init__(
        self, service: Service, scenario: Scenario, model: nn.Module, meter: QueryCounter | None = None
    ) -> None:
        meter = meter or QueryCounter()
        border = InputCheck()

        def ask(x: Tensor) -> Tensor:
            if scenario.access is Access.NOTHING:
                raise Refused("asked the victim under a threat model that grants nothing")
            border.check(x)
            _afford(len(x), scenario.budget, meter)
            meter.answered += len(x)
            with torch.no_grad():
                answers = torch.cat([truncate(service(part), scenario) for part in x.split(ANSWER_CHUNK)])
            return answers.detach()

        def hand_out() -> nn.Module:
            if scenario.access is not Access.WEIGHTS:
                raise Refused(f"asked for the weights, but only {scenario.access.name.lower()} were granted")
            return copy.deepcopy(model).eval().requires_grad_(False)

        def count() -> int:
            border.settle()
            return meter.answered

        self.scenario = scenario
        self._ask, self._hand_out, self._count = ask, hand_out, count

    def __call__(self, x: Tensor) -> Tensor:
        """Log-probabilities (N,K), truncated to the grant, for images `x` (N,C,H,W) in [0,1].

        Raises `Refused` before answering when the budget does not cover all of `x`, or nothing was granted.
        """
        return self._ask(x)

    @property
    def answered(self) -> int:
        """Images answered so far. Raises `Refused` when an accelerator has been asked about something else than images."""
        return self._count()

    @property
    def left(self) -> int | None:
        """Images that the budget still covers; None: no limit."""
        return None if self.scenario.budget is None else self.scenario.budget - self.answered

    def model(self) -> nn.Module:
        """A frozen copy of the hardened model; raises `Refused` unless weights were granted."""
        return self._hand_out()


def truncate(log_p: Tensor, scenario: Scenario) -> Tensor:
    """Log-probabilities (N,K) cut down to what `scenario` reveals: all, the top k renormalised, or the top label alone."""
    if scenario.access is Access.LABEL:
        return keep_top(log_p, 1)
    if scenario.access is Access.TOPK:
        return keep_top(log_p, scenario.topk)
    return log_p


def keep_top(log_p: Tensor, n: int) -> Tensor:
    """Keep the `n` largest of each row, renormalised; -inf for the rest. By index: ties never enlarge the support.

    Of equal entries the first is kept, as argmax has it.
    """
    values, order = log_p.sort(dim=1, descending=True, stable=True)
    kept = torch.full_like(log_p, -torch.inf).scatter(1, order[:, :n], values[:, :n])
    return kept.log_softmax(dim=1)


def _afford(images: int, budget: int | None, meter: QueryCounter) -> None:
    if budget is not None and meter.answered + images > budget:
        raise Refused(f"asked for {images} answers with {budget - meter.answered} of {budget} left")


class InputCheck:
    """Lets nothing pass but images in [0,1].

    What lies on the CPU is looked at before it is answered. An accelerator works by itself, and looking would make the
    host wait for it at every step: what it was asked is noted there, and looked at when somebody wants to `settle`.
    """

    def __init__(self) -> None:
        self._crossed: Tensor | None = None

    def check(self, x: Tensor) -> None:
        """Raises `Refused` for what is no float tensor (N,C,H,W), and for one on the CPU that reaches outside [0,1]."""
        if x.ndim != 4 or not x.is_floating_point():
            raise Refused(f"an oracle answers float images (N,C,H,W), not {tuple(x.shape)} of {x.dtype}")
        if len(x):
            self.note(~((x.amin() >= 0) & (x.amax() <= 1)))  # true for NaN
            if x.device.type == "cpu":
                self.settle()

    def note(self, crossed: Tensor) -> None:
        """Remember whether images have `crossed` the border, a truth value on any device."""
        self._crossed = crossed if self._crossed is None else self._crossed | crossed

    def settle(self) -> None:
        """Raises `Refused` if any have, once."""
        crossed, self._crossed = self._crossed, None
        if crossed is not None and crossed:
            raise Refused("an oracle answers images in [0,1]; these reach outside")
