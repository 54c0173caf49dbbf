"""Standard knowledge distillation as an attack: Hinton et al. 2015, as in the Nasty Teacher's repository (ICLR 2021)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from kdbench.api import Access, Attack, Context, Loss, Oracle, Positive, QueryFunction, Share, fit, kd


@dataclass(frozen=True)
class KD(Attack):
    """Trains the student on the victim's softened answers and the true labels.

    alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) CE(z_s, y); without labels the first term alone.
    queries: "augmented" asks the oracle about every augmented batch, as the papers do; "once" asks about each image
    once and reuses the answer for its augmentations. Defaults: the official CIFAR-10 values.
    """

    needs: ClassVar[Access] = Access.TOPK

    temperature: Positive = 4.0
    alpha: Share = 0.9
    queries: Literal["augmented", "once"] = "augmented"

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        distil(student, oracle, ctx, self.temperature, self.alpha, self.queries)
        return student


def distil(student: nn.Module, teacher: QueryFunction, ctx: Context, T: float, alpha: float, queries: str) -> None:
    """Train `student` on what `teacher` (an oracle, or anything that answers with logits) says of the attacker's images."""
    answers = teacher(ctx.data.x) if queries == "once" else teacher
    fit(student, kd_loss(T, alpha, ctx.data.labelled), ctx.data.x, (answers, ctx.data.y), ctx)


def kd_loss(T: float, alpha: float, labelled: bool) -> Loss:
    """The loss of standard KD for targets (answers (N,K), labels (N,))."""

    def loss(z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        log_p, y = target
        return kd(z, log_p, y if labelled else None, T, alpha)

    return loss
