"""MAD, maximising angular deviation: Orekondy et al., "Prediction Poisoning: Towards Defenses Against DNN Model Stealing
Attacks", ICLR 2020, arXiv 1906.10908."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Context, Defense, NonNegative

from ._ball import clean_probabilities, float_safe, keep_argmax

FEW = 10  # classes up to which all extreme points are tried
TRIES = 1024  # extreme points tried above that
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SHORT = 1e-12  # a gradient whose square is less has no direction


@dataclass(frozen=True)
class MAD(Defense):
    """Moves each answer within an L1 ball of radius epsilon so that the gradient of a student that learns from it turns.

    max || G^T y' / |G^T y'| - G^T y / |G^T y| ||^2 such that |y' - y|_1 <= epsilon. Row k of G is the gradient of -log
    p_k in the weights of the last layer of a surrogate student. The surrogate is a fresh network that learns nothing, as
    in the official code (learning rate 0), but its batch norms have seen the owner's images. y* is the best extreme point
    of the simplex; y' lies on the line from y to y*, as far out as is allowed.

    With keep_argmax, y* is the best answer that is spread evenly over a set of classes with the label among them. Up to 10
    classes all such sets are tried. Above 10, sets are grown from the label, each time by the class that turns the
    gradient most, until 1024 have been tried. Defaults: those of ModelGuard's code, which keeps the label. Without
    keep_argmax so large an epsilon changes the label of nearly every answer.

    A fresh network gives nearly the same probability to all classes, and the gradient of such a surrogate turns most for
    the even answer over all of them. So with keep_argmax answers are often only flattened, as in the code.

    What is computed: row k of G is (p - e_k) h^T for features h. The features cancel in the angle, which is that between
    p - y' and p - y. It is the official one for all networks whose last layer is linear; for others it is the angle in
    their logits.

    Departures: batch norms take their statistics from the owner's images; the official code's take them from its transfer
    set, which here only the attacker has. y* always maximises the angle; the code's own default is the plain distance
    |G^T (y* - y)| (its flag objmax, which ModelGuard sets). The code makes the label lead by 1e-5 in y*, here it leads by
    one step of float32 in y'. Above 10 classes the label alone is tried too. What rounding may add to the distance is
    taken off epsilon (2e-6).
    """

    epsilon: NonNegative = 1.0
    keep_argmax: bool = True

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module:
        return settled(ctx.new_student(), ctx)

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.turned(log_p, clean_probabilities(ctx.auxiliary_logits(x)))

    def turned(self, log_p: Tensor, guess: Tensor) -> Tensor:
        """log y' (N,K) from the victim's log-probabilities and the surrogate's probabilities (N,K)."""
        y, top = clean_probabilities(log_p), log_p.argmax(dim=1, keepdim=True)
        extreme = self.extreme(y, guess, top)
        distance = (extreme - y).abs().sum(dim=1, keepdim=True)
        share = (float_safe(self.epsilon) / distance.clamp_min(SHORT)).clamp_max(1)
        moved = ((1 - share) * y + share * extreme).log().to(log_p.dtype)
        return keep_argmax(moved, top) if self.keep_argmax else moved

    def extreme(self, y: Tensor, guess: Tensor, top: Tensor) -> Tensor:
        """y* (N,K) for answers `y` (N,K) with labels `top` (N,1) and the surrogate's probabilities (N,K), in float64."""
        turn = Turn(y, guess)
        if not self.keep_argmax:
            return F.one_hot(turn.cosine(turn.pull, guess, 1).argmin(dim=1), y.shape[1]).to(y.dtype)
        chosen = tried(turn, top) if y.shape[1] <= FEW else grown(turn, top)
        return chosen / chosen.sum(dim=1, keepdim=True)


def settled(net: nn.Module, ctx: Context) -> nn.Module:
    """`net` with the running statistics of its batch norms taken from the owner's images; its weights do not change.

    As built the statistics are 0 and 1: a deep residual network then gives every image the same class with certainty.
    """
    norms = [layer for layer in net.modules() if isinstance(layer, BATCH_NORMS)]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with torch.no_grad():
        for x in ctx.data.x.split(ctx.recipe.batch):
            if len(x) > 1:  # of one image there is no variance
                net(x)
    return net.eval()


class Turn:
    """The angle between the gradients of answers y' and of `y` (N,K), for a surrogate whose probabilities are `guess`."""

    def __init__(self, y: Tensor, guess: Tensor) -> None:
        self.guess, self.pull = guess, F.normalize(guess - y, dim=1)
        self._along = (guess * self.pull).sum(dim=1, keepdim=True)
        self._square = guess.square().sum(dim=1, keepdim=True)

    def cosine(self, pull: Tensor, guess: Tensor, size: Tensor | int) -> Tensor:
        """Cosine between p - y' and p - y, for y' spread evenly over `size` classes; `pull`, `guess`: sums over these."""
        square = self._square + (1 - 2 * guess) / size
        cosine = (self._along - pull / size) / square.clamp_min(SHORT).sqrt()
        # Sums round differently in other batches; a tie must be a tie for an image in any batch.
        return cosine.round(decimals=9)


def tried(turn: Turn, top: Tensor) -> Tensor:
    """The best of all sets of classes that hold `top` (N,1), as zeros and ones (N,K)."""
    classes = turn.guess.shape[1]
    bits = torch.arange(1, 2**classes, device=top.device)[:, None] >> torch.arange(classes, device=top.device)
    sets = (bits & 1).to(turn.guess.dtype)
    cosine = turn.cosine(turn.pull @ sets.T, turn.guess @ sets.T, sets.sum(dim=1))
    lacking = sets.T[top[:, 0]] == 0
    return sets[cosine.masked_fill(lacking, torch.inf).argmin(dim=1)]


def grown(turn: Turn, top: Tensor) -> Tensor:
    """A good set of classes that holds `top` (N,1), as zeros and ones (N,K): the best on the way of a greedy search."""
    classes, count, size = turn.guess.shape[1], 1, 1
    chosen = best = torch.zeros_like(turn.guess).scatter(1, top, 1.0)
    pull, guess = turn.pull.gather(1, top), turn.guess.gather(1, top)
    least = turn.cosine(pull, guess, 1)
    while size < classes and count < TRIES:
        count, size = count + classes - size, size + 1
        cosine = turn.cosine(pull + turn.pull, guess + turn.guess, size).masked_fill(chosen > 0, torch.inf)
        cosine, added = cosine.min(dim=1, keepdim=True)
        chosen = chosen.scatter(1, added, 1.0)
        pull, guess = pull + turn.pull.gather(1, added), guess + turn.guess.gather(1, added)
        best, least = torch.where(cosine < least, chosen, best), torch.minimum(cosine, least)
    return best
