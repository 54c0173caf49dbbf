"""What defenses that move an answer within an L1 ball share: the true answer, the room there is, and the label kept."""

import torch
from torch import Tensor

ROUNDING = 2e-6  # more than writing an answer down in float32 moves it, the classes' errors together


def truth(z: Tensor) -> Tensor:
    """softmax(z) (N,K) of logits `z`, in float64: what is moved shall not drown in rounding."""
    return z.double().softmax(dim=1)


def room(epsilon: float) -> float:
    """How far an answer may be moved to be within `epsilon` of the truth even as it is written down in float32."""
    return max(0.0, epsilon - ROUNDING)


def keep_argmax(log_p: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities (N,K) whose first maximum is `top` (N,1), which has one but for rounding, or shares it."""
    most = log_p.gather(1, top)
    less = torch.nextafter(most, torch.full_like(most, -torch.inf))
    return torch.minimum(log_p, less).scatter(1, top, most)
