"""Helpers of defenses that move an answer within an L1 ball: clean probabilities, a float-safe epsilon, a kept label."""

import torch
from torch import Tensor

ROUNDING = 2e-6  # more than writing an answer in float32 moves it, the errors of all classes added


def clean_probabilities(log_p: Tensor) -> Tensor:
    """softmax (N,K) of logits or log-probabilities (N,K), in float64: rounding must not hide a small perturbation."""
    return log_p.double().softmax(dim=1)


def float_safe(epsilon: float) -> float:
    """`epsilon` less the rounding of float32: an answer moved so far is still within `epsilon` when it is written."""
    return max(0.0, epsilon - ROUNDING)


def keep_argmax(log_p: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities (N,K) whose first maximum is `top` (N,1), which is the maximum up to rounding, or tied with it."""
    most = log_p.gather(1, top)
    less = torch.nextafter(most, torch.full_like(most, -torch.inf))
    return torch.minimum(log_p, less).scatter(1, top, most)
