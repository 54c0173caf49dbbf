"""DeepInversion: Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020."""

from dataclasses import dataclass
from typing import ClassVar, Literal

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
    autocast,
    fit,
    jensen_shannon,
    kd_term,
    soften,
)

from ._features import Features

# What is optimised is (x - GREY) / CONTRAST: the scale of the paper's normalised images, learnt from no data.
GREY, CONTRAST = 0.5, 0.25
LIMIT = GREY / CONTRAST
COMPETITION_T = 3.0


@dataclass(frozen=True)
class DeepInversion(Attack):
    """Reads images out of the victim's weights, and distils on what the oracle says of them; owns no data.

    Images minimise CE(z_T(x), y) + tv R_tv + l2 ||x|| + feature R_feat + competition (1 - JS(victim, rival)): R_feat
    compares what enters each batch norm with what that layer remembers; a victim without batch norm is inverted without
    it (batch_norm_layers = 0 is written down). competition > 0 is Adaptive DeepInversion (the paper: 10): the rival is
    an evolving student, which learns `steps` recipe batches of the pool before each new batch of images. The student
    that is returned is another one, trained afterwards on all `images` by the thief's recipe, at `temperature`, with
    the KL alone, for nobody labelled them. queries: as in KD, for both students.
    Defaults: the paper's CIFAR-10 values. Departures: each step ends with a projection to [0,1], since an oracle
    answers no other images; the best iterate is kept, where the official code keeps the last; the Jensen-Shannon
    divergence is the true one, in nats, not clamped (the official code swaps the slots of its KLs); and the outer loop
    is ours, for it was never released.
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
        student = ctx.new_student()  # before the rival: it starts from the same weights as the student of other thieves
        pool = self._synthesise(oracle, ctx)
        ctx.log.images("inverted", pool.images[:64])
        ctx.log("inversion_loss", float(pool.losses[:, 0].mean()))
        ctx.log("feature_loss", float(pool.losses[:, 1].mean()))
        fit(student, self.loss, pool.images, pool.answers if self.queries == "once" else oracle, ctx)
        return student

    def data_subset(self) -> DataSubset:
        return DataSubset(fraction=0.0)

    def loss(self, z: Tensor, log_p: Tensor) -> Tensor:
        """The KL of standard KD for logits `z` (N,K) and the oracle's answers (N,K)."""
        return kd_term(z, log_p, self.temperature)

    def _synthesise(self, oracle: Oracle, ctx: Context) -> "Pool":
        """All images, a batch at a time. An interrupted run goes on after the last batch that was saved."""
        competing_student = ctx.new_student().eval() if self.competition else None
        slot = ctx.log.slot()
        pool = self._resume(slot, competing_student, ctx)
        with Features(oracle.model()) as features:
            ctx.log("batch_norm_layers", len(features.layers))
            judge = Judge(self, features, competing_student, ctx)
            while (made := len(pool.images)) < self.images:
                if competing_student is not None and made:
                    self._teach(competing_student, pool, oracle, ctx)
                images, losses = self._invert(made, judge, ctx)
                pool = pool.grown(images, oracle(images) if self.queries == "once" else pool.answers[:0], losses)
                if ctx.log.due():
                    ctx.log.save(
                        slot,
                        {
                            "pool": vars(pool),
                            "rival": {} if competing_student is None else competing_student.state_dict(),
                        },
                    )
        return pool

    def _resume(self, slot: str, competing_student: nn.Module | None, ctx: Context) -> "Pool":
        state = ctx.log.load(slot)
        if state is None:
            return Pool.empty(ctx)
        pool = Pool(**{name: value.to(ctx.device) for name, value in state["pool"].items()})
        if competing_student is not None:
            competing_student.load_state_dict(state["rival"])
            for _ in range(len(pool.losses) - 1):
                ctx.log.slot()  # each lesson that is over had one: the pieces of work to come keep their names
        return pool

    def _teach(self, competing_student: nn.Module, pool: "Pool", oracle: Oracle, ctx: Context) -> None:
        """`steps` recipe batches of KD on images drawn from the pool: one epoch of that length."""
        size = (self.steps * ctx.recipe.batch,)
        index = torch.randint(len(pool.images), size, generator=ctx.generator, device=ctx.device)
        answers: Tensor | QueryFunction = pool.answers[index] if self.queries == "once" else oracle
        fit(competing_student, self.loss, pool.images[index], answers, ctx.training(epochs=1))

    def _invert(self, made: int, judge: "Judge", ctx: Context) -> tuple[Tensor, Tensor]:
        """The next batch after `made` images: (N,C,H,W) in [0,1], the best of all iterates, and its (loss, R_feat) (2,)."""
        y = torch.arange(made, min(made + self.batch, self.images), device=ctx.device) % ctx.data.classes
        u = torch.randn(len(y), *ctx.data.shape, generator=ctx.generator, device=ctx.device)
        u.clamp_(-LIMIT, LIMIT).requires_grad_()
        adam = torch.optim.Adam([u], self.lr, fused=True)
        best, least = torch.zeros_like(u), torch.full((2,), torch.inf, device=ctx.device)
        for iteration, shift in enumerate(self._shifts(ctx)):
            losses = judge(u.roll(shift, dims=(2, 3)), y)
            (u.grad,) = torch.autograd.grad(losses[0], u)  # for the images alone, never for a weight
            # Chosen on the device, so that the host waits for nothing; and a copy, for the step writes to u.
            better = losses[0] < least[0]
            best, least = torch.where(better, u.detach(), best), torch.where(better, losses.detach(), least)
            adam.step()
            with torch.no_grad():
                u.clamp_(-LIMIT, LIMIT)
            share = (made + len(y) * (iteration + 1) / self.iterations) / self.images
            ctx.log.progress(share, f"{made}/{self.images} images inverted")
        if not bool(losses.isfinite().all()):
            raise KdbenchError(f"the inversion diverged: its loss is not finite at learning rate {self.lr}")
        return GREY + CONTRAST * best, least

    def _shifts(self, ctx: Context) -> list[list[int]]:
        """How far (rows, columns) the images are rolled in each iteration, drawn at once."""
        size = (self.iterations, 2)
        drawn = torch.randint(-self.jitter, self.jitter + 1, size, generator=ctx.generator, device=ctx.device)
        return [[int(rows), int(columns)] for rows, columns in drawn.tolist()]


@dataclass(frozen=True)
class Judge:
    """What images are judged by: the weights of the attack's terms, the watched victim, and the rival of the adaptive variant."""

    attack: DeepInversion
    features: Features
    competing_student: nn.Module | None
    ctx: Context

    def __call__(self, u: Tensor, y: Tensor) -> Tensor:
        """(loss, R_feat) (2,) of standardised images `u` (N,C,H,W) meant as `y` (N,); one forward pass of each net."""
        x = GREY + CONTRAST * u
        with autocast(self.ctx):
            z, r_feat = self.features(x)
            competing_students = None if self.competing_student is None else self.competing_student(x)
        z = z.float() if z.dtype == torch.bfloat16 else z
        prior = self.attack.tv * total_variation(u) + self.attack.l2 * u.norm()
        loss = F.cross_entropy(z, y) + prior + self.attack.feature * r_feat
        if competing_students is not None:
            divergence = jensen_shannon(soften(z, COMPETITION_T), soften(competing_students.to(z.dtype), COMPETITION_T))
            loss = loss + self.attack.competition * (1 - divergence)
        return torch.stack([loss, r_feat])


@dataclass(frozen=True)
class Pool:
    """Images (N,C,H,W) in [0,1], what the oracle said of them (N,K) if asked once, and (loss, R_feat) a batch (B,2)."""

    images: Tensor
    answers: Tensor
    losses: Tensor

    @classmethod
    def empty(cls, ctx: Context) -> "Pool":
        """No images yet."""
        sizes = ((0, *ctx.data.shape), (0, ctx.data.classes), (0, 2))
        return cls(*(torch.empty(size, device=ctx.device) for size in sizes))

    def grown(self, images: Tensor, answers: Tensor, losses: Tensor) -> "Pool":
        """With one more batch."""
        return Pool(
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
