"""Reverse Sigmoid: Lee et al., "Defending Against Neural Network Model Stealing Attacks Using Deceptive Perturbations",
IEEE Security and Privacy Workshops 2019."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.api import Context, Defense, Positive, Service, inference


@dataclass(frozen=True)
class ReverseSigmoid(Defense):
    """Takes from likely classes and gives to unlikely ones, so that very different logits give the same answer.

    y' = clip(y - r, 0, 1) / sum, r = beta (sigmoid(gamma log(y / (1 - y))) - 1/2). The victim stays as it is; its label
    may not: with a large beta, less is left of the winner than is given to the others. Defaults: the Adversarial
    Robustness Toolbox's, meant for few classes: at them a winner below 0.35 or so loses to the least likely class, which
    with 100 classes is common; ModelGuard plays beta = 0.008, gamma = 0.2. Departure: the toolbox keeps y away from 0 and 1;
    here the odds come from log-probabilities, are right as far as float32 goes, and no class is cut off.
    """

    beta: Positive = 1.0
    gamma: Positive = 0.1

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask = inference(model, ctx)
        return lambda x: self.perturbed(ask(x).log_softmax(dim=1))

    def perturbed(self, log_p: Tensor) -> Tensor:
        """Log-probabilities (N,K) -> those of y'. Some class is always left: at most one lies above 1/2 and loses."""
        p = (log_p.exp() - self.beta * ((self.gamma * log_odds(log_p)).sigmoid() - 0.5)).clamp(0, 1)
        return (p / p.sum(dim=1, keepdim=True)).log()


def log_odds(log_p: Tensor) -> Tensor:
    """log(y / (1 - y)) of log-probabilities (N,K), from -inf for y = 0 to inf for y = 1."""
    top = log_p.argmax(dim=1, keepdim=True)
    # 1 - y of a winner near 1 has no digits left; the sum of the others has them all.
    others = log_p.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    return log_p - (-log_p.exp()).log1p().scatter(1, top, others)
