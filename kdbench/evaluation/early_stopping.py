"""Runs torchattacks with early stopping: images that are already misclassified are not attacked further."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CLEAR_LEAD = 1e-3  # of another class, as a share of the spread of the logits: rounding cannot undo it
LASTING_LEAD = 0.15  # and PGD in short steps does not bring the image back
CACHED_PIXELS = 2**16  # of a batch that a CPU's cache holds, with what small networks compute from them
LARGEST, LEAST = 512, 16  # images of a batch

AdversarialAttack = Callable[[Tensor, Tensor], Tensor]
"""Images (N,C,H,W) in [0,1] and their labels (N,) -> candidates for adversarial examples of them (N,C,H,W)."""


def batch_size(x: Tensor) -> int:
    """How many of images `x` (N,C,H,W) are fastest to ask at once: as many as a CPU's cache holds, within bounds."""
    if x.device.type != "cpu":
        return LARGEST
    return max(LEAST, min(LARGEST, CACHED_PIXELS // x.shape[2:].numel()))


class EarlyStopping(nn.Module):
    """A network (images -> logits) as attacks see it: asked `batch` images at a time, about active examples only.

    Attacks run torchattacks' own code, which treats each image by itself. While an attack is tracked, an image to which
    the network gives another class by a clear lead is misclassified, and no longer active. From then on the attack gets
    that last answer again, without gradient, and the image it had asked about is the example. When no active example is
    left the attack ends. Active examples move as they would without early stopping; random numbers are drawn for all
    images at once, on a CPU.
    """

    def __init__(self, network: nn.Module, batch: int) -> None:
        super().__init__()
        self.network, self.batch = network, batch
        self._active: _ActiveExamples | None = None
        self.eval()  # torchattacks would put the network into training mode after the attack, as it found its wrapper

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K)."""
        if self._active:
            return self._active.answers(x)
        return torch.cat([self.network(part) for part in x.split(self.batch)])

    def in_batches(self, attack: AdversarialAttack) -> AdversarialAttack:
        """`attack` in batches, with all its steps on every image."""
        return lambda x, y: torch.cat([attack(*part) for part in self._batches(x, y)])

    def stopping_early(self, attack: AdversarialAttack) -> AdversarialAttack:
        """PGD in batches, ended for an image that another class leads by `LASTING_LEAD`.

        PGD returns its last point, whether it is misclassified or not, and now and then a step makes the network right
        again. In steps of a quarter of the radius or less, from this lead, it did so for 1 of some 150,000 verdicts on
        37 small networks (digits and CIFAR-10, some trained adversarially). In steps as long as the radius it did so
        for 1 in some hundreds. A misclassified image has an example in the ball, whatever follows it.
        """

        def stopped(x: Tensor, y: Tensor) -> Tensor:
            moved = x
            with self._tracking(x, y, LASTING_LEAD) as active:
                moved = attack(x, y)
            return active.examples(moved)

        return self.in_batches(stopped)

    def stopping_runs_early(self, attack: Any) -> AdversarialAttack:
        """An APGD or APGDT in batches, each run (a target, a restart) ended for an image when it is misclassified.

        These attacks return a misclassified point if they met one, so verdicts do not change.
        """

        def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            # Best points, whether each image is robust, losses, examples: these where no active example is left.
            outcome = x, torch.zeros_like(y, dtype=torch.bool), x.new_zeros(len(x)), x
            with self._tracking(x, y, CLEAR_LEAD) as active:
                outcome = type(attack).attack_single_run(attack, x, y)
            *others, moved = outcome
            return *others, active.examples(moved)

        def runs(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return tuple(map(torch.cat, zip(*(run(*part) for part in self._batches(x, y)), strict=True)))

        attack.attack_single_run = runs
        stopped: AdversarialAttack = attack
        return stopped

    def _batches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x.split(self.batch), y.split(self.batch), strict=True)

    @contextmanager
    def _tracking(self, x: Tensor, y: Tensor, lead: float) -> Iterator["_ActiveExamples"]:
        self._active = _ActiveExamples(self.network, x, y, lead)
        try:
            yield self._active
        except _AllMisclassified:
            pass
        finally:
            self._active = None


class _AllMisclassified(Exception):
    """No active example is left for the attack."""


class _ActiveExamples:
    """One run of an attack on images `x` (N,C,H,W) of classes `y` (N,), which asks about all of them at each step."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, lead: float) -> None:
        self._network, self._y, self._lead = network, y, lead
        self._active = torch.arange(len(y), device=y.device)
        self._examples = x.clone()
        self._answers = x.new_empty(0)

    def answers(self, x: Tensor) -> Tensor:
        """Logits (N,K) for the images of a step (N,C,H,W): new ones for active examples, the last ones for others."""
        active = self._active
        z: Tensor = self._network(x if len(active) == len(x) else x[active])
        answers = self._answers.index_copy(0, active, z) if len(self._answers) else z
        self._drop_misclassified(x.detach(), z.detach())
        self._answers = answers.detach()
        return answers

    def examples(self, moved: Tensor) -> Tensor:
        """The examples (N,C,H,W) of the misclassified images; for active ones what the attack returned, `moved`."""
        self._examples[self._active] = moved[self._active]
        return self._examples

    def _drop_misclassified(self, x: Tensor, z: Tensor) -> None:
        wrong = _lead(z, self._y[self._active]) > self._lead
        misclassified, self._active = self._active[wrong], self._active[~wrong]
        self._examples[misclassified] = x[misclassified]
        if not len(self._active):
            raise _AllMisclassified


def _lead(z: Tensor, y: Tensor) -> Tensor:
    """By what share of the spread of logits `z` (N,K) another class leads the label `y` (N,); NaN where not finite."""
    own = z.gather(1, y[:, None]).squeeze(1)
    other = z.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return (other - own) / (z.amax(dim=1) - z.amin(dim=1))
