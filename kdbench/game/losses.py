"""Losses that several methods share. Teachers give log-probabilities (N,K), -inf where withheld; students give logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soften(log_p: Tensor, T: float) -> Tensor:
    """Probabilities softmax(log_p / T) (N,K): those of softmax(z / T), for log p equals z up to a constant. -inf stays 0."""
    return (log_p / T).softmax(dim=1)


def kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), summed over classes, mean over the batch ("batchmean"); 0 log 0 = 0. p (N,K) probabilities."""
    if p.requires_grad:
        p = p.clamp_min(torch.finfo(p.dtype).tiny)  # p log p has no gradient at 0
    return F.kl_div(log_q, p, reduction="batchmean")


def kd_term(z: Tensor, log_p: Tensor, T: float) -> Tensor:
    """T^2 KL(softmax(log_p / T) || softmax(z / T)): Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"."""
    return T**2 * kl(soften(log_p, T), (z / T).log_softmax(dim=1))


def kd(z: Tensor, log_p: Tensor, y: Tensor | None, T: float, alpha: float) -> Tensor:
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE(z, y), as in the repository of the Nasty Teacher.

    Where `y` is None there are no labels: then the value is the first term without its weight alpha.
    """
    if y is None:
        return kd_term(z, log_p, T)
    return alpha * kd_term(z, log_p, T) + (1 - alpha) * F.cross_entropy(z, y)


def soft_cross_entropy(z: Tensor, p: Tensor) -> Tensor:
    """- sum_i p_i log softmax(z)_i, mean over the batch; p (N,K) probabilities."""
    return F.cross_entropy(z, p)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of probabilities (N,K), mean over the batch, between 0 and log 2 nats."""
    tiny = torch.finfo(p.dtype).tiny
    p, q = p.clamp_min(tiny), q.clamp_min(tiny)  # for m: log 0 has no gradient either
    log_m = (0.5 * (p + q)).log()
    return 0.5 * kl(p, log_m) + 0.5 * kl(q, log_m)
