"""Sequence of contrastive models (SCM): Jandial et al., "Distilling the Undistillable: Learning from a Nasty Teacher",
ECCV 2022."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import (
    Access,
    Attack,
    Context,
    KdbenchError,
    NonNegative,
    Oracle,
    Positive,
    QueryFunction,
    Share,
    fit,
    inference,
    kl,
    soften,
)

from .averager import labels_or_top
from .kd import distil


@dataclass(frozen=True)
class SCM(Attack):
    """Trains models that each know the labels and contradict their predecessor, and distils the mean of their answers.

    Each model: min CE(z, y) - omega tau^2 KL(softmax(z / tau) || softmax(z_before / tau)), the Nasty Teacher's loss; the
    first model's predecessor is the victim. Wrong peaks average out: the student runs KD from q, the mean of the models'
    softmax(z / T). models: registered networks in order, "" for the student's own. Only the first asks the oracle
    (queries: as in KD); the models' answers cost no queries.
    The official code is not public and the paper's text was not available: this follows its abstract. tau, omega, T and
    alpha are those of an unofficial re-implementation for CIFAR-10, which contradicts once and distils from there in a
    chain. Our choices: the number of models, that the victim is not in the mean, and that softened probabilities are
    averaged.
    Departures: a probability below `floor` counts as `floor` in a predecessor's answers (they may withhold classes), which
    also bounds the KL. Where labels are unknown, a predecessor's top answer is the label, and the student's loss is the KL
    alone.
    """

    needs: ClassVar[Access] = Access.TOPK
    adaptive: ClassVar[bool] = True

    models: tuple[str, ...] = ("", "", "")
    tau: Positive = 4.0
    omega: NonNegative = 0.04
    temperature: Positive = 4.0
    alpha: Share = 0.9
    floor: Positive = 1e-7
    queries: Literal["augmented", "once"] = "augmented"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise KdbenchError("SCM.models must name at least one network: the student learns from these alone.")

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()  # before the models: it starts from the same weights as the student of KD
        distil(student, self.ensemble(self._sequence(oracle, ctx)), ctx, self.temperature, self.alpha, "augmented")
        return student

    def networks(self) -> tuple[str, ...]:
        return tuple(name for name in self.models if name)

    def _sequence(self, oracle: Oracle, ctx: Context) -> list[QueryFunction]:
        """The contrastive models, trained."""
        before: Tensor | QueryFunction = oracle(ctx.data.x) if self.queries == "once" else oracle
        asks: list[QueryFunction] = []
        for model in [ctx.new_student(name or None) for name in self.models]:
            fit(model, self.contrast, ctx.data.x, (before, ctx.data.y), ctx)
            before = inference(model, ctx)
            asks.append(before)
        return asks

    def contrast(self, z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """A model's loss, for logits `z` (N,K) and (its predecessor's answers (N,K), labels (N,))."""
        before, y = target
        log_q = before.log_softmax(dim=1).clamp_min(math.log(self.floor))
        contradiction = self.tau**2 * kl(soften(z, self.tau), (log_q / self.tau).log_softmax(dim=1))
        return F.cross_entropy(z, labels_or_top(before, y)) - self.omega * contradiction

    def ensemble(self, asks: Sequence[QueryFunction]) -> QueryFunction:
        """All of `asks` as one: its answers (N,K), softened at T, are the mean of theirs."""

        def ask(x: Tensor) -> Tensor:
            q = torch.stack([soften(one(x), self.temperature) for one in asks]).mean(dim=0)
            return self.temperature * q.log()

        return ask
