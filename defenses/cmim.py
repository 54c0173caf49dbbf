"""CMI minimised (CMIM): Ye, Hamidi & Yang, "Towards Undistillable Models by Minimizing Conditional Mutual Information",
arXiv 2507.00012, 2025."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Context, Defense, NonNegative, Positive, fit, predict_logits


@dataclass(frozen=True)
class CMIM(Defense):
    """Trains a hardened model that answers all images of a class alike, at every temperature.

    min CE(z, y) + weight sum_T I(X; Y'_T | Y), where Y'_T has the distribution softmax(z / T). The information is the mean
    divergence KL(p || q_y) of answers p from the mean answer q_y to their class. The model starts from fresh weights.
    Departures: the paper's text and training code were not available; this follows its abstract. Our choices are the
    weight, a sum over a few temperatures for its whole spectrum, in nats at each, and q_y from the batch, with gradient.
    A batch of n images of a class shows (n - 1) / n of their spread, so it counts n / (n - 1) times. A single image of its
    class counts nothing: with many classes, use large batches. Written down: information, on the owner's images.
    """

    weight: NonNegative = 1.0
    temperatures: tuple[Positive, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        hardened = ctx.new_student()
        fit(hardened, self.loss, ctx.data.x, ctx.data.y, ctx)
        # An owner should see how far the classes collapsed: it is 0 when each has one answer.
        ctx.log("information", float(information(predict_logits(hardened, ctx.data.x), ctx.data.y)))
        return hardened

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """CE(z, y) + weight sum_T I(X; Y'_T | Y) for logits `z` (N,K) and labels (N,), mean over the batch."""
        spread = sum((information(z / T, y) for T in self.temperatures), torch.zeros_like(z[0, 0]))
        return F.cross_entropy(z, y) + self.weight * spread


def information(z: Tensor, y: Tensor) -> Tensor:
    """I(X; Y' | Y) in nats from logits `z` (N,K) and labels (N,): mean over the images; one alone in its class counts 0.

    Small classes do not make it small: its expectation equals that of large ones, up to the second order of the spread.
    """
    log_p, members = z.log_softmax(dim=1), F.one_hot(y, z.shape[1]).to(z.dtype)
    p, count = log_p.exp(), members.sum(dim=0)
    centre = (members.T @ p)[y] / count[y, None]
    tiny = torch.finfo(z.dtype).tiny  # the logarithm of a class that no answer of the batch's class contains
    divergence = (p * (log_p - centre.clamp_min(tiny).log())).sum(dim=1)
    return (divergence * count[y] / (count[y] - 1).clamp_min(1)).mean()
