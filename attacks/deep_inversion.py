"""DeepInversion: Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import (
    Access,
    Attack,
    Context,
    Count,
    DataSubset,
    KdbenchError,
    NonNegative,
    Oracle,
    Positive,
    QueryFunction,
    Whole,
    fit,
    forward,
    jensen_shannon,
    kd_term,
    restore,
    soften,
)

from ._features import Features

# What is optimised is (x - GREY) / CONTRAST: the scale of the paper's normalised images, without any data.
GREY, CONTRAST = 0.5, 0.25
LIMIT = GREY / CONTRAST
COMPETITION_T = 3.0
VISIBLE = 64  # images that are kept for people to look at


@dataclass(frozen=True)
class DeepInversion(Attack):
    """Synthesises images from the victim's weights, and distils on the oracle's answers to them; has no data.

    Images minimise CE(z_T(x), y) + tv R_tv + l2 ||x|| + feature R_feat + competition (1 - JS(victim, competing student)).
    R_feat compares what enters each batch norm with that layer's running statistics. A victim without batch norm is
    inverted without it (batch_norm_layers = 0 is written down). competition > 0 is Adaptive DeepInversion (the paper: 10):
    the competing student learns `steps` recipe batches of the images made so far before each new batch of images. The
    student that is returned is another one. It is trained afterwards on all `images` by the attacker's recipe, at
    `temperature`, with the KL alone, because the images have no true labels. queries: as in KD, for both students.

    Defaults: the paper's CIFAR-10 values. Written down: inversion_loss, feature_loss, batch_norm_layers.
    Departures: each step ends with a projection to [0,1], since an oracle answers no other images. The best iterate is
    kept, where the official code keeps the last. The Jensen-Shannon divergence is the true one, in nats, not clamped (the
    official code swaps the arguments of its KLs). The outer loop is ours: the paper's was never released.
    """

    needs: ClassVar[Access] = Access.WEIGHTS

    images: Count = 256_000
    batch: Count = 256
    iterations: Count = 2000
    lr: Positive = 0.05
    feature: NonNegative = 10.0
    tv: NonNegative = 2.5e-5
    l2: NonNegative = 3e-8
    jitter: Whole = 2
    competition: NonNegative = 0.0
    steps: Count = 50
    temperature: Positive = 3.0
    queries: Literal["augmented", "once"] = "augmented"

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = (
            ctx.new_student()
        )  # before the competing one: it starts from the same weights as other attacks' students
        made = self._synthesise(oracle, ctx)
        ctx.log.images("inverted", made.images[:VISIBLE], self._labels(0, VISIBLE, ctx))
        ctx.log("inversion_loss", float(made.losses[:, 0].mean()))
        ctx.log("feature_loss", float(made.losses[:, 1].mean()))
        fit(student, self.loss, made.images, made.answers if self.queries == "once" else oracle, ctx)
        return student

    def data_subset(self) -> DataSubset:
        return DataSubset(fraction=0.0)

    def loss(self, z: Tensor, log_p: Tensor) -> Tensor:
        """The KL of standard KD for logits `z` (N,K) and the oracle's answers (N,K)."""
        return kd_term(z, log_p, self.temperature)

    def _synthesise(self, oracle: Oracle, ctx: Context) -> "Synthesised":
        """All images, a batch at a time. An interrupted run goes on after the last batch that was saved."""
        competing_student = ctx.new_student().eval() if self.competition else None
        checkpoint = ctx.checkpoint("images")
        made = self._resumed(checkpoint.load(), competing_student, ctx)
        with Features(oracle.model()) as features:
            ctx.log("batch_norm_layers", len(features.layers))
            objective = Objective(self, features, competing_student, ctx)
            while len(made.images) < self.images:
                if competing_student is not None and len(made.images):
                    self._teach(competing_student, made, oracle, ctx)
                images, losses = self._invert(len(made.images), objective, ctx)
                made = made.grown(images, oracle(images) if self.queries == "once" else made.answers[:0], losses)
                if checkpoint.due():
                    weights = competing_student.state_dict() if competing_student is not None else {}
                    checkpoint.save({"made": vars(made), "competing_student": weights})
        return made

    def _resumed(self, state: Any, competing_student: nn.Module | None, ctx: Context) -> "Synthesised":
        if state is None:
            return Synthesised.empty(ctx)
        if competing_student is not None:
            restore(competing_student, state["competing_student"])
        return Synthesised(**{name: value.to(ctx.device) for name, value in state["made"].items()})

    def _teach(self, competing_student: nn.Module, made: "Synthesised", oracle: Oracle, ctx: Context) -> None:
        """`steps` recipe batches of KD on images drawn from those made so far: one epoch of that length."""
        size = (self.steps * ctx.recipe.batch,)
        index = torch.randint(len(made.images), size, generator=ctx.generator, device=ctx.device)
        answers: Tensor | QueryFunction = made.answers[index] if self.queries == "once" else oracle
        name = f"competing_student/{len(made.losses)}"
        fit(competing_student, self.loss, made.images[index], answers, ctx.training(epochs=1), name)

    def _labels(self, first: int, count: int, ctx: Context) -> Tensor:
        """The labels (N,) that the images from number `first` on are meant to show: one class after another."""
        return torch.arange(first, min(first + count, self.images), device=ctx.device) % ctx.data.classes

    def _invert(self, made: int, objective: "Objective", ctx: Context) -> tuple[Tensor, Tensor]:
        """The next batch after `made` images: (N,C,H,W) in [0,1], the best of all iterates, and its (loss, R_feat) (2,)."""
        y = self._labels(made, self.batch, ctx)
        u = torch.randn(len(y), *ctx.data.shape, generator=ctx.generator, device=ctx.device)
        u.clamp_(-LIMIT, LIMIT).requires_grad_()
        adam = torch.optim.Adam([u], self.lr, fused=True)
        best, least = torch.zeros_like(u), torch.full((2,), torch.inf, device=ctx.device)
        for iteration, shift in enumerate(self._shifts(ctx)):
            losses = objective(u.roll(shift, dims=(2, 3)), y)
            (u.grad,) = torch.autograd.grad(losses[0], u)  # for the images alone, never for a weight
            # Chosen on the device, so that the host does not wait; and copied, because the step writes to u.
            better = losses[0] < least[0]
            best, least = torch.where(better, u.detach(), best), torch.where(better, losses.detach(), least)
            adam.step()
            with torch.no_grad():
                u.clamp_(-LIMIT, LIMIT)
            done = (made + len(y) * (iteration + 1) / self.iterations) / self.images
            ctx.log.progress(done, f"{made}/{self.images} images inverted")
        if not bool(losses.isfinite().all()):
            raise KdbenchError(f"the inversion diverged: its loss is not finite at learning rate {self.lr}")
        return GREY + CONTRAST * best, least

    def _shifts(self, ctx: Context) -> list[list[int]]:
        """How far (rows, columns) the images are rolled in each iteration, drawn at once."""
        size = (self.iterations, 2)
        drawn = torch.randint(-self.jitter, self.jitter + 1, size, generator=ctx.generator, device=ctx.device)
        return [[int(rows), int(columns)] for rows, columns in drawn.tolist()]


@dataclass(frozen=True)
class Objective:
    """What images minimise: the attack's weights of its terms, the watched victim, and the competing student if any."""

    attack: DeepInversion
    features: Features
    competing_student: nn.Module | None
    ctx: Context

    def __call__(self, u: Tensor, y: Tensor) -> Tensor:
        """(loss, R_feat) (2,) of standardised images `u` (N,C,H,W) meant as `y` (N,); one forward pass of each net."""
        x = GREY + CONTRAST * u
        z = forward(self.features, x, self.ctx)
        r_feat = self.features.distance()
        prior = self.attack.tv * total_variation(u) + self.attack.l2 * u.norm()
        loss = F.cross_entropy(z, y) + prior + self.attack.feature * r_feat
        if self.competing_student is not None:
            competing = forward(self.competing_student, x, self.ctx)
            divergence = jensen_shannon(soften(z, COMPETITION_T), soften(competing, COMPETITION_T))
            loss = loss + self.attack.competition * (1 - divergence)
        return torch.stack([loss, r_feat])


@dataclass(frozen=True)
class Synthesised:
    """Images (N,C,H,W) in [0,1], the oracle's answers (N,K) if asked once, and (loss, R_feat) a batch (B,2)."""

    images: Tensor
    answers: Tensor
    losses: Tensor

    @classmethod
    def empty(cls, ctx: Context) -> "Synthesised":
        """No images yet."""
        sizes = ((0, *ctx.data.shape), (0, ctx.data.classes), (0, 2))
        return cls(*(torch.empty(size, device=ctx.device) for size in sizes))

    def grown(self, images: Tensor, answers: Tensor, losses: Tensor) -> "Synthesised":
        """With one more batch."""
        return Synthesised(
            torch.cat([self.images, images]),
            torch.cat([self.answers, answers]),
            torch.cat([self.losses, losses[None]]),
        )


def total_variation(u: Tensor) -> Tensor:
    """R_tv: the norms, over the whole batch, of the differences of neighbours in four directions; u (N,C,H,W)."""
    down = u[..., 1:, :] - u[..., :-1, :]
    right = u[..., 1:] - u[..., :-1]
    fall = u[..., 1:, 1:] - u[..., :-1, :-1]
    rise = u[..., :-1, 1:] - u[..., 1:, :-1]
    return torch.stack([step.norm() for step in (down, right, fall, rise)]).sum()
