"""Nasty Teacher: Ma et al., "Undistillable: Making A Nasty Teacher That CANNOT teach students", ICLR 2021."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Context, Defense, Diverged, NonNegative, Positive, fit, inference, kl, predict_logits, soften


@dataclass(frozen=True)
class Nasty(Defense):
    """Trains a hardened model that keeps the victim's labels and contradicts its soft answers (eq. 2).

    min CE(z, y) - omega tau^2 KL(softmax(z / tau) || softmax(z_A / tau)). The adversary A is the victim itself, frozen;
    the hardened model starts from fresh weights, as in the official code. Defaults: its CIFAR-10 values.
    Departure: the KL can grow as far as the adversary's logits are apart, and big networks are known to diverge. After a
    divergence the training starts once more with gradients clipped to norm `clip`, or to the recipe's if that is less,
    and guarded = 1 is written down. clip = 0 switches this off. Written down: contradiction, the KL term on the owner's
    images.
    """

    tau: Positive = 4.0
    omega: NonNegative = 0.04
    clip: NonNegative = 1.0

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        try:
            return self._train(victim, ctx)
        except Diverged:
            if not self.clip:
                raise
        ctx.log("guarded", 1)
        return self._train(victim, ctx.training(clip=min(self.clip, ctx.recipe.clip or self.clip)))

    def _train(self, victim: nn.Module, ctx: Context) -> nn.Module:
        hardened = ctx.new_student()
        fit(hardened, self.loss, ctx.data.x, (inference(victim, ctx), ctx.data.y), ctx)
        # An owner should see how nasty the hardened model became: after CIFAR-10, well under 9 is not nasty enough.
        ctx.log(
            "contradiction",
            float(self.contradiction(predict_logits(hardened, ctx.data.x), predict_logits(victim, ctx.data.x))),
        )
        return hardened

    def loss(self, z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Eq. 2 for logits `z` (N,K) and (adversary's logits (N,K), labels (N,)); the gradient reaches the KL's first slot."""
        adversary, y = target
        return F.cross_entropy(z, y) - self.omega * self.contradiction(z, adversary)

    def contradiction(self, z: Tensor, adversary: Tensor) -> Tensor:
        """tau^2 KL(softmax(z / tau) || softmax(adversary / tau)), nasty first, mean over the batch."""
        return self.tau**2 * kl(soften(z, self.tau), (adversary / self.tau).log_softmax(dim=1))
