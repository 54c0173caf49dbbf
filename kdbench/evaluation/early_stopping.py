"""Attacks of torchattacks, spared work that changes no verdict: images already fooled, batches beyond the cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SURE = 1e-3  # by how much another class leads, as a share of the spread of the logits, when rounding cannot undo it
LOST = 0.15  # and when PGD, in short steps, does not bring the image back
CACHED = 2**16  # pixels of a batch that a CPU's cache holds with what small networks make of them
LARGEST, LEAST = 512, 16  # images of a batch

AdversarialAttack = Callable[[Tensor, Tensor], Tensor]
"""Images (N,C,H,W) in [0,1] and their labels (N,) -> what shall be adversarial examples of them (N,C,H,W)."""


def rows(x: Tensor) -> int:
    """How many of images `x` (N,C,H,W) are best asked at once."""
    return max(LEAST, min(LARGEST, CACHED // x.shape[2:].numel())) if x.device.type == "cpu" else LARGEST


class EarlyStopping(nn.Module):
    """A network (images -> logits) as attacks see it: asked `rows` images at a time, and not again about what fell.

    Attacks run torchattacks' own code, on all their images, which do not meet in it. In a hunt, an image that the
    network gives another class by a clear lead is felled: from then on the attack is told that answer again, without
    gradient, and what it asked about is the image's example. When all are felled the hunt ends. What still stands is
    moved as if nothing had been spared; random numbers are drawn as for all images at once, on a CPU.
    """

    def __init__(self, network: nn.Module, rows: int) -> None:
        super().__init__()
        self.network, self.rows = network, rows
        self._active: _ActiveExamples | None = None
        self.eval()  # torchattacks would put the net into training mode after the attack, as it found its wrapper

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K)."""
        if self._active:
            return self._active.answers(x)
        return torch.cat([self.network(part) for part in x.split(self.rows)])

    def whole(self, attack: AdversarialAttack) -> AdversarialAttack:
        """`attack` in batches, with all its steps on every image."""
        return lambda x, y: torch.cat([attack(*part) for part in self._parts(x, y)])

    def stopping_early(self, attack: AdversarialAttack) -> AdversarialAttack:
        """PGD in batches, ended for an image that another class leads by `LOST`.

        PGD returns its last point, fooled or not, and now and then a step brings a fooled image back: in steps of a
        quarter of the radius or less, from this lead, it did so for 1 of some 150,000 verdicts on 37 small networks
        (digits and CIFAR-10, some trained adversarially); in steps as long as the radius for 1 in some hundreds.
        A felled image has an example in the ball, whatever follows it.
        """

        def evade(x: Tensor, y: Tensor) -> Tensor:
            moved = x
            with self._tracking(x, y, LOST) as hunt:
                moved = attack(x, y)
            return hunt.examples(moved)

        return self.whole(evade)

    def stopping_runs_early(self, attack: Any) -> AdversarialAttack:
        """An APGD or APGDT in batches, each run (a target, a restart) ended for an image when it falls.

        These return a point that fooled the network if there was one: verdicts do not change.
        """

        def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            # Best points, whether each image stands, losses, examples: this when the hunt ends before the run.
            outcome = x, torch.zeros_like(y, dtype=torch.bool), x.new_zeros(len(x)), x
            with self._tracking(x, y, SURE) as hunt:
                outcome = type(attack).attack_single_run(attack, x, y)
            *others, moved = outcome
            return *others, hunt.examples(moved)

        def runs(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return tuple(map(torch.cat, zip(*(run(*part) for part in self._parts(x, y)), strict=True)))

        attack.attack_single_run = runs
        evade: AdversarialAttack = attack
        return evade

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x.split(self.rows), y.split(self.rows), strict=True)

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
    """Nothing is left for the attack to do."""


class _ActiveExamples:
    """One run of an attack on images `x` (N,C,H,W) of classes `y` (N,), which asks about all of them at each step."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, lead: float) -> None:
        self._network, self._y, self._lead = network, y, lead
        self._standing = torch.arange(len(y), device=y.device)
        self._examples = x.clone()
        self._answers = x.new_empty(0)

    def answers(self, x: Tensor) -> Tensor:
        """Logits (N,K) for the images of a step (N,C,H,W): of what stands new ones, of the others the last."""
        standing = self._standing
        z: Tensor = self._network(x if len(standing) == len(x) else x[standing])
        told = self._answers.index_copy(0, standing, z) if len(self._answers) else z
        self._note(x.detach(), z.detach())
        self._answers = told.detach()
        return told

    def examples(self, moved: Tensor) -> Tensor:
        """What felled each image that fell, and of the others what the attack returned, `moved` (N,C,H,W)."""
        self._examples[self._standing] = moved[self._standing]
        return self._examples

    def _note(self, x: Tensor, z: Tensor) -> None:
        falls = _lead(z, self._y[self._standing]) > self._lead
        misclassified, self._standing = self._standing[falls], self._standing[~falls]
        self._examples[misclassified] = x[misclassified]
        if not len(self._standing):
            raise _AllMisclassified


def _lead(z: Tensor, y: Tensor) -> Tensor:
    """By how much of the logits' spread another class leads the label, for logits `z` (N,K); NaN where they are not finite."""
    own = z.gather(1, y[:, None]).squeeze(1)
    other = z.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return (other - own) / (z.amax(dim=1) - z.amin(dim=1))
