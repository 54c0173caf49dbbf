"""Cross-entropy: the student that the attacker can train on its own labels. A no-query baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Access, Attack, Context, KdbenchError, Oracle, fit


@dataclass(frozen=True)
class CrossEntropy(Attack):
    """Trains the student on the attacker's own labels; never asks."""

    needs: ClassVar[Access] = Access.NOTHING

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        fit(student, F.cross_entropy, ctx.data.x, own_labels(ctx), ctx)
        return student


def own_labels(ctx: Context) -> Tensor:
    """The labels (N,) of the attacker's images; raises `KdbenchError` when it does not know them all."""
    if not ctx.data.labelled:
        raise KdbenchError("there are no labels to train on: in this scenario the attacker has images alone")
    return ctx.data.y
