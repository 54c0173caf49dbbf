"""Stingy Teacher: Ma et al., "Sparse Logits Suffice to Fail Knowledge Distillation", PAIR^2Struct at ICLR 2022."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kdbench.api import Context, Defense, Fraction, KdbenchError, Service, inference, keep_top


@dataclass(frozen=True)
class Stingy(Defense):
    """Reveals the most likely `ratio` of the classes, renormalised, and withholds the rest; the victim stays unchanged.

    Of K classes floor(ratio K), at least one, are revealed. hidden: "minus-infinity" withholds the others, as the
    official code does; "zero" writes 0 into their logits, as the abstract says. This is a weaker ablation, in which a
    class whose logit was negative rises and may become the label. Default: the CIFAR-10 value.
    """

    ratio: Fraction = 0.2
    hidden: Literal["minus-infinity", "zero"] = "minus-infinity"

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        if self.hidden == "zero":
            raise KdbenchError("stingy with hidden = 'zero' changes logits, which log-probabilities do not tell.")
        return keep_top(log_p, self.revealed(log_p.shape[1]))

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        if self.hidden == "minus-infinity":
            return super().serve(model, ctx)
        ask, revealed = inference(model, ctx), self.revealed(ctx.data.classes)
        return lambda x: zero_rest(ask(x), revealed)

    def revealed(self, classes: int) -> int:
        """How many of so many classes are revealed, from 1 to all."""
        return max(1, math.floor(self.ratio * classes + 1e-9))  # 0.29 * 100 is 28.999999999999996


def zero_rest(z: Tensor, n: int) -> Tensor:
    """Log-probabilities (N,K) of logits `z` with 0 written into all but the `n` largest of each row."""
    values, order = z.sort(dim=1, descending=True, stable=True)  # of equal logits the first, as for the label
    return torch.zeros_like(z).scatter(1, order[:, :n], values[:, :n]).log_softmax(dim=1)
