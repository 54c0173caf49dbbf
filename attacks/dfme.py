"""Data-free model extraction: Truong et al., "Data-Free Model Extraction", CVPR 2021."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import (
    Access,
    Attack,
    Context,
    Count,
    DataSubset,
    Fraction,
    KdbenchError,
    Oracle,
    Positive,
    draw_seed,
    restore,
    seeded,
)

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of the student's SGD
DECAY, MILESTONES = 0.3, (0.1, 0.3, 0.5)  # both rates are multiplied by DECAY after these shares of the rounds


@dataclass(frozen=True)
class DFME(Attack):
    """Asks about images of a generator that is trained to make student and victim differ; has no data and no weights.

    In a round the generator makes one step up, and the student `steps` steps down, on the mean of |z - v| over a batch
    and the classes. z are the student's logits, v the victim's as recovered from answers: log-probabilities less their
    mean; below `floor` they count as it. The generator's gradient with respect to its images, before their tanh, is
    estimated by forward differences of width `epsilon` along random unit `directions`. Images reach the oracle after the
    tanh, in [0,1]. Every probe is a query: a round costs batch (directions + 1 + steps). There are as many rounds as
    `queries` and the budget allow. The student's last weights count.

    Defaults: the official code's, for CIFAR-10: SGD at `lr`, Adam at `generator_lr`, both times 0.3 at 10, 30 and 50 %.
    The attacker's recipe is not used: its epochs are of a fixed set of images, and here there is none. Written down:
    rounds, and disagreement, the mean of |z - v| of the last batch.
    Departures: the official code clips no answer, and keeps the student that is best on test data. Its rates fall
    once in 50 rounds, ours in any; it divides the estimate by the number of classes once more, which Adam undoes. Sides
    that 4 does not divide are rounded up at the generator's start. Student and victim are probed in fp32 only: so small
    differences are lost in bf16.
    """

    needs: ClassVar[Access] = Access.PROBS

    queries: Count = 20_000_000
    batch: Count = 256
    steps: Count = 5
    directions: Count = 1
    epsilon: Positive = 1e-3
    lr: Positive = 0.1
    generator_lr: Positive = 1e-4
    noise: Count = 256
    width: Count = 64
    floor: Fraction = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 2:
            raise KdbenchError("DFME.batch must be at least 2: batch norm cannot normalise a batch of one image.")

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        if ctx.precision != "fp32":
            raise KdbenchError(
                f"dfme needs precision fp32, not {ctx.precision}: its small differences are lost in rounding."
            )
        rounds = self.rounds(oracle.left)  # of the whole attack run: a resumed one has not yet restored the query count
        extraction, checkpoint = GeneratorStudentGame(self, oracle, ctx), ctx.checkpoint("rounds")
        extraction.resume(checkpoint.load())
        while extraction.rounds < rounds:
            extraction.round(extraction.rounds / rounds)
            ctx.log.progress(extraction.rounds / rounds, f"round {extraction.rounds}/{rounds}")
            if checkpoint.due():
                checkpoint.save(extraction.state())
        ctx.log.images("generated", extraction.images()[:64])
        ctx.log("rounds", rounds)
        ctx.log("disagreement", float(extraction.loss))
        return extraction.student.eval()

    def data_subset(self) -> DataSubset:
        return DataSubset(fraction=0.0)

    def rounds(self, left: int | None) -> int:
        """How many rounds there are for `left` answers (None: no limit); raises `KdbenchError` when not one."""
        cost = self.batch * (self.directions + 1 + self.steps)
        answers = self.queries if left is None else min(self.queries, left)
        if answers < cost:
            raise KdbenchError(
                f"a round of {cost} answers is more than the {answers} there are: make DFME.batch smaller"
            )
        return answers // cost

    def recovered(self, log_p: Tensor) -> Tensor:
        """The victim's logits (N,K) up to a constant a row, from its answers (N,K): clipped and centred."""
        clipped = log_p.clamp_min(math.log(self.floor))
        return clipped - clipped.mean(dim=1, keepdim=True)


class GeneratorStudentGame:
    """A student and a generator with opposite objectives, trained in turn."""

    def __init__(self, attack: DFME, oracle: Oracle, ctx: Context) -> None:
        self.attack, self.ctx, self._oracle = attack, ctx, oracle
        self.student = ctx.new_student()
        with seeded(draw_seed(ctx.generator)):  # the initial weights of a layer come from the global generator
            self._generator = generator(attack.noise, attack.width, ctx.data.shape).to(ctx.device)
        weights, decay = self.student.parameters(), WEIGHT_DECAY
        self._sgd = torch.optim.SGD(weights, attack.lr, MOMENTUM, weight_decay=decay, fused=True)
        self._adam = torch.optim.Adam(self._generator.parameters(), attack.generator_lr, fused=True)
        self.rounds = 0
        self.loss = torch.zeros((), device=ctx.device)

    def round(self, share: float) -> None:
        """One round after `share` of all rounds."""
        factor = DECAY ** sum(share >= milestone for milestone in MILESTONES)
        self._sgd.param_groups[0]["lr"] = factor * self.attack.lr
        self._adam.param_groups[0]["lr"] = factor * self.attack.generator_lr
        with seeded(draw_seed(self.ctx.generator), self.ctx.device):  # dropout draws from the global generator
            self._train_generator()
            for _ in range(self.attack.steps):
                self.loss = self._train_student()
        self.rounds += 1

    def images(self) -> Tensor:
        """A batch of the generator's images (N,C,H,W) in [0,1]."""
        with torch.no_grad():
            return as_images(self._generator(self._noise()))

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return {**state, "rounds": self.rounds, "loss": self.loss}

    def resume(self, state: Any) -> None:
        """Go on from `state`, if there is one."""
        if state is None:
            return
        for name, part in self._parts().items():
            restore(part, state[name])
        self.rounds, self.loss = int(state["rounds"]), state["loss"].to(self.ctx.device)

    def _parts(self) -> dict[str, Any]:
        return {"student": self.student, "generator": self._generator, "sgd": self._sgd, "adam": self._adam}

    def _train_generator(self) -> None:
        """The generator's step, towards images on which student and victim differ."""
        self.student.eval()
        u = self._generator(self._noise())
        gradient = slope(
            self._disagreement, u.detach(), self.attack.directions, self.attack.epsilon, self.ctx.generator
        )
        if not bool(gradient.isfinite().all()):  # else the generator diverges too, and the oracle refuses its images
            raise KdbenchError(f"the extraction diverged in round {self.rounds}, at learning rate {self.attack.lr}")
        self._adam.zero_grad()
        u.backward(-gradient / len(u))
        self._adam.step()
        self.student.train()

    def _train_student(self) -> Tensor:
        """A step of the student, and the mean disagreement before it."""
        x = self.images()
        target = self.attack.recovered(self._oracle(x))
        loss = F.l1_loss(self.student(x), target)
        self._sgd.zero_grad()
        loss.backward()
        self._sgd.step()
        return loss.detach()

    def _disagreement(self, u: Tensor) -> Tensor:
        """The mean of |z - v| over the classes (N,) for images (N,C,H,W) before their tanh."""
        x = as_images(u)
        with torch.no_grad():
            z = self.student(x)
        gap: Tensor = z - self.attack.recovered(self._oracle(x))
        return gap.abs().mean(dim=1)

    def _noise(self) -> Tensor:
        size, draw = (self.attack.batch, self.attack.noise), self.ctx.generator
        return torch.randn(size, generator=draw, device=self.ctx.device)


def as_images(u: Tensor) -> Tensor:
    """The outputs of a generator, any numbers, as images in [0,1]."""
    return 0.5 + 0.5 * u.tanh()


def slope(
    f: Callable[[Tensor], Tensor], u: Tensor, directions: int, epsilon: float, generator: torch.Generator
) -> Tensor:
    """The gradients (N,...) of `f`, points (M,...) -> values (M,), at `u` (N,...), by forward differences.

    d/m sum_i (f(u + epsilon v_i) - f(u)) / epsilon v_i over m random unit directions v_i of each point, d its size.
    """
    v = torch.randn((directions, *u.shape), generator=generator, device=u.device, dtype=u.dtype).flatten(2)
    v = F.normalize(v, dim=2).view(directions, *u.shape)
    points = torch.cat([u[None], u + epsilon * v])
    values = f(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    rise = (values[1:] - values[0]) / epsilon
    return u[0].numel() * torch.einsum("mn,mn...->n...", rise, v) / directions


def generator(noise: int, width: int, shape: tuple[int, int, int]) -> nn.Sequential:
    """(N,noise) -> images (N,C,H,W) of `shape` before their tanh: doubled twice from a quarter of each side, rounded up."""
    channels, *sides = shape
    quarter, half = ([-(-side // part) for side in sides] for part in (4, 2))
    return nn.Sequential(
        nn.Linear(noise, 2 * width * math.prod(quarter)),
        nn.Unflatten(1, (2 * width, *quarter)),
        nn.BatchNorm2d(2 * width),
        nn.Upsample(size=tuple(half)),
        *convolved(2 * width, 2 * width),
        nn.Upsample(size=tuple(sides)),
        *convolved(2 * width, width),
        nn.Conv2d(width, channels, 3, padding=1),
        nn.BatchNorm2d(channels, affine=False),
    )


def convolved(inputs: int, outputs: int) -> list[nn.Module]:
    """A 3x3 convolution, batch norm and leaky ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2, inplace=True)]
