"""Adaptive Misinformation: Kariyappa & Qureshi, "Defending Against Model Stealing Attacks with Adaptive Misinformation",
CVPR 2020."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import (
    UNKNOWN,
    Context,
    Defense,
    Loss,
    NonNegative,
    Positive,
    Service,
    Share,
    fit,
    inference,
    predict_logits,
)

TILES = 4  # into how many parts an image is cut, each way, to make an outlier


@dataclass(frozen=True)
class AdaptiveMisinformation(Defense):
    """Answers what the victim knows well, and lies about what looks foreign to it.

    y' = (1 - a) y + a f(x), a = sigmoid(nu (threshold - max y)). f learns to be wrong: min -log(1 - f(x)_y). The victim
    is trained anew, with outlier exposure: min CE(z, y) + exposure CE(z of outliers, uniform); exposure = 0 leaves it as
    it is. Whoever asks about the owner's own kind of images, as thieves mostly do here, meets few lies.

    Defaults: the official code's nu and exposure (ports to other code bases have nu = 1000). The threshold is the dial
    between accuracy and theft; the code's example for MNIST has 0.99, ours spares victims that are seldom that sure. Of
    two classes one always has 1/2: there it must be higher, or no lie is told.
    Departures: no second data set is at hand, so outliers are the owner's images with bands of rows and columns in
    disorder, one for each, drawn once and augmented like the others; a batch is drawn from both kinds at once, as many
    of either on average; f is trained after the victim, not beside it, and so on the final victim's labels of outliers;
    -log(1 - f) is exact, without the code's 1e-7.
    f is a second network beside the deployed one; it costs a training on twice the images, by the owner's recipe.
    """

    threshold: Share = 0.5
    nu: Positive = 10_000.0
    exposure: NonNegative = 1.0

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        if not self.exposure:
            return victim
        hardened, strange = ctx.new_student(), outliers(ctx)
        train(hardened, self.loss, ctx, strange, torch.full_like(ctx.data.y, UNKNOWN))
        # An owner should see whom the lies are told: strangers, or the public as well.
        ctx.log("caught", self._misled(hardened, strange))
        ctx.log("misled", self._misled(hardened, ctx.data.x))
        return hardened

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module:
        misinformation_model, strange = ctx.new_student(), outliers(ctx)
        train(misinformation_model, wrong, ctx, strange, predict_logits(model, strange).argmax(dim=1))
        return misinformation_model

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        tell, lie = inference(model, ctx), inference(ctx.auxiliary or self.auxiliary(model, ctx), ctx)
        return lambda x: self.mixed(tell(x).log_softmax(dim=1), lie(x).log_softmax(dim=1))

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Half the batch's CE(z, y), half exposure CE(z, uniform), for logits (N,K) and labels (N,), UNKNOWN of outliers.

        Twice the mean over both, so that it is the sum of two means where a batch holds as many of either.
        """
        log_p, strange = z.log_softmax(dim=1), y == UNKNOWN
        told = F.nll_loss(log_p, y.clamp_min(0), reduction="none")
        return 2 * torch.where(strange, -self.exposure * log_p.mean(dim=1), told).mean()

    def mixed(self, log_p: Tensor, log_lie: Tensor) -> Tensor:
        """log y' (N,K) from the log-probabilities (N,K) of the victim and of f."""
        doubt = self.doubt(log_p)
        return torch.logaddexp(log_p + F.logsigmoid(-doubt), log_lie + F.logsigmoid(doubt))

    def doubt(self, log_p: Tensor) -> Tensor:
        """nu (threshold - max y) (N,1) for log-probabilities (N,K): a is its sigmoid."""
        return self.nu * (self.threshold - log_p.amax(dim=1, keepdim=True).exp())

    def _misled(self, model: nn.Module, x: Tensor) -> float:
        return float((self.doubt(predict_logits(model, x).log_softmax(dim=1)) > 0).float().mean())


def wrong(z: Tensor, y: Tensor) -> Tensor:
    """-log(1 - softmax(z)_y), mean over the batch, for logits (N,K) and labels (N,): the reversed cross-entropy."""
    return -z.log_softmax(dim=1).scatter(1, y[:, None], -torch.inf).logsumexp(dim=1).mean()


def train(net: nn.Module, loss: Loss, ctx: Context, strange: Tensor, labels: Tensor) -> None:
    """Train `net` on the owner's images and as many `strange` ones with `labels`, at the recipe's number of steps."""
    x, y = torch.cat([ctx.data.x, strange]), torch.cat([ctx.data.y, labels])
    fit(net, loss, x, y, ctx.training(batch=2 * ctx.recipe.batch))


def outliers(ctx: Context) -> Tensor:
    """The owner's images (N,C,H,W), each cut into bands of rows and then of columns that are put in a random order."""
    x = ctx.data.x
    for dim in (2, 3):
        bands = torch.arange(x.shape[dim], device=x.device) * TILES // x.shape[dim]
        place = torch.rand(len(x), TILES, generator=ctx.generator, device=x.device).argsort(dim=1)[:, bands]
        order = place.argsort(dim=1, stable=True)  # within a band as before
        x = x.gather(dim, order.unflatten(1, (1, -1, 1) if dim == 2 else (1, 1, -1)).expand_as(x))
    return x
