"""Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016. A baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Access, Attack, Context, Oracle, Share, fit

from .cross_entropy import own_labels


@dataclass(frozen=True)
class LabelSmoothing(Attack):
    """Trains the student on the attacker's own labels, with label smoothing; never asks.

    The target is (1 - smoothing) onehot(y) + smoothing / K. A victim from which no attack learns more than this may be
    called undistillable (the criterion of Markov KD, ECCV 2024).
    """

    needs: ClassVar[Access] = Access.NOTHING

    smoothing: Share = 0.1

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        fit(student, self.loss, ctx.data.x, own_labels(ctx), ctx)
        return student

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits `z` (N,K) with (1 - smoothing) onehot(y) + smoothing / K; y (N,)."""
        return F.cross_entropy(z, y, label_smoothing=self.smoothing)
