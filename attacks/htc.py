"""High temperature composition (HTC): Jandial et al., "Distilling the Undistillable: Learning from a Nasty Teacher",
ECCV 2022."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Access, Attack, Context, NonNegative, Oracle, Positive, Share, fit, kl, soften


@dataclass(frozen=True)
class HTC(Attack):
    """Trains the student, at temperature 1, on answers softened at a very high temperature, and on the labels.

    alpha m KL(softmax(z_t / T) || softmax(z_s)) + (1 - alpha) CE(z_s, y), with no T^2. So flat a target has no peaks of
    wrong classes left: it smooths labels, with a faint ranking of the classes. multiplier is m. queries: as in KD.
    The official code is not public: formula and defaults are those of an unofficial one for CIFAR-10 (T = 70 for
    CIFAR-100). Without labels the loss is the KL alone, unweighted, as in KD. A withheld class stays at 0 at any
    temperature: truncated answers tell it little more than which classes were revealed.
    """

    needs: ClassVar[Access] = Access.TOPK
    adaptive: ClassVar[bool] = True

    temperature: Positive = 50.0
    alpha: Share = 0.9
    multiplier: NonNegative = 1.0
    queries: Literal["augmented", "once"] = "augmented"

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        answers = oracle(ctx.data.x) if self.queries == "once" else oracle
        labelled = ctx.data.labelled

        def loss(z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
            log_p, y = target
            return self.loss(z, log_p, y if labelled else None)

        fit(student, loss, ctx.data.x, (answers, ctx.data.y), ctx)
        return student

    def loss(self, z: Tensor, log_p: Tensor, y: Tensor | None) -> Tensor:
        """The loss above for logits `z` (N,K), answers `log_p` (N,K), labels `y` (N,) or None where none are known."""
        flat = kl(soften(log_p, self.temperature), z.log_softmax(dim=1))
        if y is None:
            return flat
        return self.alpha * self.multiplier * flat + (1 - self.alpha) * F.cross_entropy(z, y)
