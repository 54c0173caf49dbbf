"""Adaptive Misinformation: Kariyappa & Qureshi, "Defending Against Model Stealing Attacks with Adaptive Misinformation",
CVPR 2020."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import UNKNOWN, Context, Defense, Loss, NonNegative, Positive, Share, fit, predict_logits

TILES = 4  # into how many bands an image is cut, each way, to make an out-of-distribution input


@dataclass(frozen=True)
class AdaptiveMisinformation(Defense):
    """Answers out-of-distribution inputs by a misinformation model, a second network that learns to be wrong.

    y' = (1 - a) y + a f(x), a = sigmoid(nu (threshold - max y)). The misinformation model f minimises -log(1 - f(x)_y).
    The victim is trained anew, with outlier exposure: min CE(z, y) + exposure CE(z of outliers, uniform); exposure = 0
    deploys it unchanged. Questions about images of the owner's own kind, which most attacks here ask, are rarely
    answered wrongly.

    Defaults: the official code's nu and exposure (ports to other code bases have nu = 1000). The threshold trades
    accuracy against protection. The code's example for MNIST has 0.99; ours is lower, for victims that are seldom that
    certain. One of two classes always has 1/2: there the threshold must be higher, or it has no effect.
    Departures: no second data set is at hand. So outliers are the owner's images with bands of rows and columns in random
    order, one for each image, drawn once and augmented like the others. A batch is drawn from both kinds at once, as many
    of either on average. f is trained after the victim, not beside it, and so on the final victim's labels of outliers.
    -log(1 - f) is exact, without the code's 1e-7.
    f costs a training on twice the images, by the owner's recipe. Written down: detection_rate and false_positive_rate,
    the share of outliers and of the owner's images that are answered mostly by f.
    """

    threshold: Share = 0.5
    nu: Positive = 10_000.0
    exposure: NonNegative = 1.0

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        if not self.exposure:
            return victim
        hardened, foreign = ctx.new_student(), outliers(ctx)
        train(hardened, self.loss, ctx, foreign, torch.full_like(ctx.data.y, UNKNOWN))
        # An owner should see who is misinformed: those who ask about outliers, or ordinary users as well.
        ctx.log("detection_rate", self._detected(hardened, foreign))
        ctx.log("false_positive_rate", self._detected(hardened, ctx.data.x))
        return hardened

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module:
        misinformation_model, foreign = ctx.new_student(), outliers(ctx)
        train(misinformation_model, reversed_cross_entropy, ctx, foreign, predict_logits(model, foreign).argmax(dim=1))
        return misinformation_model

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.mixed(log_p, ctx.auxiliary_logits(x).log_softmax(dim=1))

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Half the batch's CE(z, y), half exposure CE(z, uniform), for logits (N,K) and labels (N,), UNKNOWN of outliers.

        Twice the mean over both, so that it is the sum of two means where a batch holds as many of either.
        """
        log_p, outlier = z.log_softmax(dim=1), y == UNKNOWN
        own = F.nll_loss(log_p, y.clamp_min(0), reduction="none")
        return 2 * torch.where(outlier, -self.exposure * log_p.mean(dim=1), own).mean()

    def mixed(self, log_p: Tensor, log_f: Tensor) -> Tensor:
        """log y' (N,K) from the log-probabilities (N,K) of the victim and of f."""
        doubt = self.doubt(log_p)
        return torch.logaddexp(log_p + F.logsigmoid(-doubt), log_f + F.logsigmoid(doubt))

    def doubt(self, log_p: Tensor) -> Tensor:
        """nu (threshold - max y) (N,1) for log-probabilities (N,K): a is its sigmoid."""
        return self.nu * (self.threshold - log_p.amax(dim=1, keepdim=True).exp())

    def _detected(self, model: nn.Module, x: Tensor) -> float:
        return float((self.doubt(predict_logits(model, x).log_softmax(dim=1)) > 0).float().mean())


def reversed_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """-log(1 - softmax(z)_y), mean over the batch, for logits `z` (N,K) and labels (N,)."""
    return -z.log_softmax(dim=1).scatter(1, y[:, None], -torch.inf).logsumexp(dim=1).mean()


def train(net: nn.Module, loss: Loss, ctx: Context, foreign: Tensor, labels: Tensor) -> None:
    """Train `net` on the owner's images and as many `foreign` ones with `labels`, in the recipe's number of steps."""
    x, y = torch.cat([ctx.data.x, foreign]), torch.cat([ctx.data.y, labels])
    fit(net, loss, x, y, ctx.training(batch=2 * ctx.recipe.batch))


def outliers(ctx: Context) -> Tensor:
    """The owner's images (N,C,H,W), each cut into bands of rows and then of columns that are put in a random order."""
    x = ctx.data.x
    for dim in (2, 3):
        bands = torch.arange(x.shape[dim], device=x.device) * TILES // x.shape[dim]
        position = torch.rand(len(x), TILES, generator=ctx.generator, device=x.device).argsort(dim=1)[:, bands]
        order = position.argsort(dim=1, stable=True)  # within a band as before
        x = x.gather(dim, order.unflatten(1, (1, -1, 1) if dim == 2 else (1, 1, -1)).expand_as(x))
    return x
