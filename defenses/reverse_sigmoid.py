"""Reverse Sigmoid: Lee et al., "Defending Against Neural Network Model Stealing Attacks Using Deceptive Perturbations",
IEEE Security and Privacy Workshops 2019."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.api import Context, Defense, Positive


@dataclass(frozen=True)
class ReverseSigmoid(Defense):
    """Adds a sigmoid-shaped perturbation that lowers likely classes and raises unlikely ones.

    Very different logits then give the same answer:
    y' = clip(y - r, 0, 1) / sum, r = beta (sigmoid(gamma log(y / (1 - y))) - 1/2).
    The victim is deployed unchanged, but its label may change: with a large beta, less is left of the most likely class
    than is given to the others. Defaults: the Adversarial Robustness Toolbox's, meant for few classes. With them a
    largest probability below about 0.35 loses to the least likely class, which is common with 100 classes. ModelGuard
    uses beta = 0.008, gamma = 0.2.
    Departure: the toolbox keeps y away from 0 and 1. Here the odds come from log-probabilities, are exact to float32,
    and no class is cut off.
    """

    beta: Positive = 1.0
    gamma: Positive = 0.1

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        # Some class is always left: at most one is above 1/2 and loses.
        p = (log_p.exp() - self.beta * ((self.gamma * log_odds(log_p)).sigmoid() - 0.5)).clamp(0, 1)
        return (p / p.sum(dim=1, keepdim=True)).log()


def log_odds(log_p: Tensor) -> Tensor:
    """log(y / (1 - y)) of log-probabilities (N,K), from -inf for y = 0 to inf for y = 1."""
    top = log_p.argmax(dim=1, keepdim=True)
    # 1 - y of a y near 1 loses all digits; the sum of the other classes keeps them.
    others = log_p.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    return log_p - (-log_p.exp()).log1p().scatter(1, top, others)
