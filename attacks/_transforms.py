"""What a thief takes an owner's output transforms to be: formulas on log-probabilities (N,K), -inf where withheld."""

import torch
from torch import Tensor

from kdbench.api import keep_top

DIGITS = 7  # decimals that float32 tells apart below 1


def rounded(log_p: Tensor, decimals: int) -> Tensor:
    """Probabilities rounded to so many decimals; a row of which nothing is left is its label alone."""
    p = log_p.exp().round(decimals=min(decimals, DIGITS))
    total = p.sum(dim=1, keepdim=True)
    return (p / total).log().where(total > 0, keep_top(log_p, 1))


def reverse_sigmoid(log_p: Tensor, beta: float, gamma: float) -> Tensor:
    """Likely classes lowered, unlikely ones raised: y - beta (sigmoid(gamma log(y / (1 - y))) - 1/2), renormalised."""
    top = log_p.argmax(dim=1, keepdim=True)
    # 1 - y of a winner near 1 has no digits left; the sum of the others has them all.
    others = log_p.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    odds = log_p - (-log_p.exp()).log1p().scatter(1, top, others)
    return normalised((log_p.exp() - beta * ((gamma * odds).sigmoid() - 0.5)).clamp_max(1))


def noisy(log_p: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Probabilities with normal noise of deviation `sigma`, drawn from `generator`."""
    drawn = torch.randn(log_p.shape, generator=generator, device=log_p.device, dtype=log_p.dtype)
    return normalised(log_p.exp() + sigma * drawn)


def normalised(p: Tensor) -> Tensor:
    """Log-probabilities of (N,K) numbers, those below 0 counted as 0; uniform where no other is left."""
    p = p.clamp_min(0)
    total = p.sum(dim=1, keepdim=True)
    return (p / total).where(total > 0, 1 / p.shape[1]).log()
