"""How strongly the logits depend on the pixels: the measure of Mandal & Gao 2023 (arXiv 2305.08076), as in their code."""

import math

import torch
from torch import Tensor, nn

from kdbench.evaluation.early_stopping import batch_size
from kdbench.evaluation.network import EvaluatedNetwork


def sensitivity(network: EvaluatedNetwork, x: Tensor) -> float:
    """Mean over images and pixels of |d(sum of all logits)/d(pixel)| at T = 1, for images `x` (N,C,H,W) in [0,1].

    It is a gradient of the logits, not of a loss.
    """
    parts = x.split(batch_size(x))
    return math.fsum(float(_gradient(network.folded, part).abs().sum()) for part in parts) / x.numel()


def _gradient(network: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(network(x).sum(), x)[0]
