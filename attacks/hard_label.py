"""Hard labels: the "top1" attacker of Tang et al., "ModelGuard", USENIX Security 2024."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Access, Attack, Context, Oracle, fit


@dataclass(frozen=True)
class HardLabel(Attack):
    """Trains the student on the victim's top-1 answers as if they were the labels; true labels are not used.

    A defense that keeps the label has no effect on it. queries: as in KD.
    """

    needs: ClassVar[Access] = Access.LABEL
    labels_only: ClassVar[bool] = True

    queries: Literal["augmented", "once"] = "augmented"

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        def label(x: Tensor) -> Tensor:
            return oracle(x).argmax(dim=1)

        student = ctx.new_student()
        fit(student, F.cross_entropy, ctx.data.x, label(ctx.data.x) if self.queries == "once" else label, ctx)
        return student
