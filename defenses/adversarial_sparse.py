"""Adversarial Sparse Teacher (AST): Yilmaz & Keles, "Adversarial Sparse Teacher: Defense Against Distillation-Based
Model Stealing Attacks Using Adversarial Examples", arXiv 2403.05181, 2024."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import (
    Context,
    Count,
    Defense,
    Loss,
    NonNegative,
    Positive,
    QueryFunction,
    Share,
    fit,
    frozen_copy,
    keep_top,
    kl,
    predict_logits,
    soften,
)


@dataclass(frozen=True)
class AdversarialSparse(Defense):
    """Trains a hardened model that answers a clean image as an adversarial one: sparsely, with a misleading class.

    min alpha T^2 D(p, q) + (1 - alpha) CE(z, y), where p = softmax(z / T) on the clean batch and q = softmax(top k of
    z' / T) on an adversarial batch. q comes from the model in training, in eval mode and held constant. The adversarial
    images are made once, by PGD (untargeted, L-inf, no random start) on the victim and the images without augmentation.
    The model starts from fresh weights. Defaults: the official CIFAR-10 values.

    divergence: "exponential" is D = mean sum exp(q) (q - p), what the released code computes; that it is the paper's
    Exponential Predictive Divergence is our inference. "kl" is KL(q || p), our reading of the paper's first version.
    pairing: "paired" takes q from the adversarial version of the same image, "random" from an unrelated image.
    space: where eps, step and the clamp to [0,1] apply: "pixel", or "normalised", that is (x - mean) / std by channel.
    There the clamp cuts off all below the mean and all above one deviation from it.
    Departures: the release pairs nothing and clamps normalised images. The defaults here follow the abstract and attack
    pixels, with the release's eps and step. That radius is about four times as wide as in its normalised images (there
    0.3 is some 0.07 of the range of a pixel). As released: pairing = "random", space = "normalised", divergence =
    "exponential". But the release's unrelated images come in stored order, here they are drawn; its mean and std are
    constants, here those of the owner's images.
    """

    alpha: Share = 0.05
    temperature: Positive = 6.0
    k: Count = 2
    divergence: Literal["exponential", "kl"] = "exponential"
    pairing: Literal["paired", "random"] = "paired"
    space: Literal["pixel", "normalised"] = "pixel"
    eps: NonNegative = 0.3
    step: Positive = 0.01
    iterations: Count = 40

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        adversarial = self.adversarial_images(victim, ctx)
        hardened = ctx.new_student()
        fit(hardened, self._loss(hardened), ctx.data.x, (self.pair(adversarial, ctx), ctx.data.y), ctx)
        return hardened

    def adversarial_images(self, victim: nn.Module, ctx: Context) -> Tensor:
        """Adversarial versions (N,C,H,W) in [0,1] of the owner's images, for `victim` in eval mode."""
        from torchattacks import PGD  # importing it takes more than a second

        x, y, batch = ctx.data.x, ctx.data.y, ctx.recipe.batch
        mean, std = self._units(x)
        target = _Shifted(frozen_copy(victim, ctx), mean, std).eval()
        pgd = PGD(target, eps=self.eps, alpha=self.step, steps=self.iterations, random_start=False)
        # Not pgd(...): that refuses images outside [0,1], as normalised ones are before the clamp.
        batches = zip(torch.split((x - mean) / std, batch), torch.split(y, batch), strict=True)
        return (torch.cat([pgd.forward(*part) for part in batches]) * std + mean).clamp(0, 1)

    def pair(self, adversarial: Tensor, ctx: Context) -> Tensor | QueryFunction:
        """The adversarial images (N,C,H,W) that a batch is paired with: its own, or as many drawn from all."""
        if self.pairing == "paired":
            return adversarial
        random = ctx.generator

        def draw(images: Tensor) -> Tensor:
            return adversarial[torch.randint(len(adversarial), (len(images),), generator=random, device=random.device)]

        return draw

    def sparse(self, net: nn.Module, x: Tensor) -> Tensor:
        """q: softened top k (N,K) of `net` in eval mode, without gradient; leaves it in train mode."""
        log_p = keep_top(predict_logits(net, x), self.k)
        net.train()
        return soften(log_p, self.temperature)

    def loss(self, z: Tensor, q: Tensor, y: Tensor) -> Tensor:
        """alpha T^2 D(p, q) + (1 - alpha) CE(z, y) for logits `z` (N,K), constant `q` (N,K) and labels (N,)."""
        return self.alpha * self.temperature**2 * self.distance(z, q) + (1 - self.alpha) * F.cross_entropy(z, y)

    def distance(self, z: Tensor, q: Tensor) -> Tensor:
        """D(p, q) for p = softmax(z / T), mean over the batch; the exponential form may be negative."""
        if self.divergence == "kl":
            return kl(q, (z / self.temperature).log_softmax(dim=1))
        return (q.exp() * (q - soften(z, self.temperature))).sum(dim=1).mean()

    def _loss(self, hardened: nn.Module) -> Loss:
        def loss(z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
            adversarial, y = target
            return self.loss(z, self.sparse(hardened, adversarial), y)

        return loss

    def _units(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The origin and the unit of the attacked space in pixels, by channel (1,C,1,1)."""
        std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        if self.space == "pixel":
            return torch.zeros_like(mean), torch.ones_like(std)
        return mean, std.clamp_min(1 / 255)  # a constant channel still has a unit


class _Shifted(nn.Module):
    """A model of pixels whose input is given in other units: x -> model(x std + mean)."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x * self.std + self.mean)
        return logits
