"""Gaussian noise on the answers: the simple baseline of defenses that perturb, e.g. in Orekondy et al., "Prediction
Poisoning", ICLR 2020."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.api import Context, Defense, NonNegative

# Of splitmix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014), as signed integers.
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BITS = 23  # of a uniform number, such that it is neither 0 nor 1 in float32


@dataclass(frozen=True)
class GaussianNoise(Defense):
    """Adds normal noise of deviation `sigma` to each probability, cuts off below 0 and renormalises.

    The noise is drawn once for an image: its bits and a secret of the service decide it, so that asking again averages
    nothing out. An attacker who changes one pixel a little does get another draw. The victim is deployed unchanged; the
    label may change. A row of which nothing is left is answered uniformly. The default is our choice.
    """

    sigma: NonNegative = 0.1

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        drawn = noise(x, log_p.shape[1], ctx.secret("noise"))
        return renormalised(log_p.exp() + self.sigma * drawn)


def renormalised(p: Tensor) -> Tensor:
    """Log-probabilities of (N,K) numbers, those below 0 counted as 0; uniform where no other is left."""
    p = p.clamp_min(0)
    total = p.sum(dim=1, keepdim=True)
    return (p / total).where(total > 0, 1 / p.shape[1]).log()


def noise(x: Tensor, count: int, secret: int) -> Tensor:
    """Standard normal numbers (N,count) that depend on each image's own bits and on `secret` alone.

    A generator seeded for each image would make an accelerator wait for the host at every one. Here all numbers are
    drawn at once, from integers, which are exact in any order.
    """
    bits = (x.float() + 0.0).flatten(1).view(torch.int32).long()  # -0 and 0 are the same pixel
    weights = _mixed(secret + GOLDEN * torch.arange(1, bits.shape[1] + 1, device=x.device)) | 1
    key = _mixed((bits * weights).sum(dim=1, keepdim=True))
    drawn = _mixed(key + GOLDEN * torch.arange(1, count + 1, device=x.device))
    uniform = (_shifted(drawn, 64 - BITS).float() + 0.5) / 2**BITS
    normal: Tensor = math.sqrt(2) * (2 * uniform - 1).erfinv()
    return normal


def _mixed(z: Tensor) -> Tensor:
    """Integers of which every bit depends on every bit of `z`: the finaliser of splitmix64, modulo 2^64."""
    z = (z ^ _shifted(z, 30)) * MIX_1
    z = (z ^ _shifted(z, 27)) * MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """`z` shifted to the right `by` bits, zeros coming in: torch's own shift brings in the sign."""
    moved: Tensor = (z >> by) & (2 ** (64 - by) - 1)
    return moved
