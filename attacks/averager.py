"""Averager student: Keser & Toreyin, "Averager Student: Distillation from Undistillable Teacher", Tiny Papers at ICLR 2023."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import UNKNOWN, Access, Attack, Context, Oracle, Positive, Share, fit, kd, soften


@dataclass(frozen=True)
class Averager(Attack):
    """Replaces each answer by the mean of its class over the batch, then runs KD: perturbations of single images cancel.

    average: what the mean is taken of. "logits" is the paper's; answers give them up to a constant a row, which cancels.
    "probabilities" averages after the temperature, as another repository does (there at T = 4). queries: as in KD.
    Defaults: the released ones.
    Departures: alpha weighs the KL once, as in KD, where the release multiplies by it twice (its KL weighs 0.81, not 0.9).
    The recipe augments as for all attacks, where the paper means to train without (the release cannot). Under "logits", a
    class that an answer withholds and another answer of its class reveals counts as the probability `floor`; a class that
    all of them withhold stays withheld. Where labels are unknown, an image's class is the oracle's top answer, and the
    loss is the KL alone, as in KD.
    """

    needs: ClassVar[Access] = Access.TOPK
    adaptive: ClassVar[bool] = True

    temperature: Positive = 20.0
    alpha: Share = 0.9
    average: Literal["logits", "probabilities"] = "logits"
    floor: Positive = 1e-7
    queries: Literal["augmented", "once"] = "augmented"

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        answers = oracle(ctx.data.x) if self.queries == "once" else oracle
        labelled = ctx.data.labelled

        def loss(z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
            log_p, y = target
            mean = self.averaged(log_p, labels_or_top(log_p, y))
            return kd(z, mean, y if labelled else None, self.temperature, self.alpha)

        fit(student, loss, ctx.data.x, (answers, ctx.data.y), ctx)
        return student

    def averaged(self, log_p: Tensor, y: Tensor) -> Tensor:
        """Answers (N,K), up to a constant a row, each the mean of those of its class `y` (N,)."""
        if self.average == "probabilities":
            return self.temperature * mean_of_class(soften(log_p, self.temperature), y).log()
        revealed = log_p > -torch.inf
        floored = log_p.log_softmax(dim=1).where(revealed, math.log(self.floor))
        return mean_of_class(floored, y).where(mean_of_class(revealed.to(log_p), y) > 0, -torch.inf)


def mean_of_class(values: Tensor, y: Tensor) -> Tensor:
    """`values` (N,K) with each row replaced by the mean of the rows with the same label, `y` (N,)."""
    # Not index_add: on a GPU its order of summation differs from run to run.
    member = F.one_hot(y, values.shape[1]).to(values)
    return (member.T @ values / member.sum(dim=0).clamp_min(1)[:, None])[y]


def labels_or_top(log_p: Tensor, y: Tensor) -> Tensor:
    """Labels `y` (N,), and where they are unknown the top class of the answers `log_p` (N,K)."""
    return torch.where(y == UNKNOWN, log_p.argmax(dim=1), y)
