"""GRAD2, gradient redirection: Mazeika et al., "How to Steer Your Adversary: Targeted and Efficient Model Stealing
Defenses with Gradient Redirection", ICML 2022, arXiv 2206.14157."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from kdbench.api import Context, Count, Defense, KdbenchError, NonNegative, fit, inference, kd_term

from ._ball import clean_probabilities, float_safe


@dataclass(frozen=True)
class GradientRedirection(Defense):
    """Moves each answer within an L1 ball so that a student that learns from it raises all its weights at once.

    max <G^T y', 1> such that |y' - y|_1 <= epsilon, where row k of G is the gradient of log p_k in all the weights of a
    surrogate student. The best answer is found exactly: epsilon / 2 goes to the class whose gradient agrees most with the
    direction. It is taken from the classes that agree least, emptied one by one. The label may change. The surrogate
    learns the victim's clean answers for a few epochs (default: the code's). The direction is the code's main one, all
    ones.

    Departures: the surrogate learns from the owner's images, by the owner's recipe, not from an attacker's queries. Its
    schedule is that of so few epochs, where the code stops a longer one early. An emptied class is withheld, where the
    code leaves it 1e-15. What rounding may add is taken off epsilon (2e-6). The default epsilon is our choice, that of the
    other defenses with such a budget; victims that are rarely certain lose most of their labels to it.
    """

    epsilon: NonNegative = 1.0
    epochs: Count = 10

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module:
        surrogate = ctx.new_student()
        fit(surrogate, learning, ctx.data.x, inference(model, ctx), ctx.training(epochs=self.epochs))
        return surrogate

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        if ctx.auxiliary is None:
            raise KdbenchError("gradient-redirection answers with the help of a surrogate, its auxiliary model")
        return self.redirected(log_p, rises(ctx.auxiliary, x))

    def redirected(self, log_p: Tensor, rise: Tensor) -> Tensor:
        """log y' (N,K) from the victim's log-probabilities (N,K) and the derivative of the objective, `rise` (N,K)."""
        return moved(clean_probabilities(log_p), rise, float_safe(self.epsilon) / 2).log().to(log_p.dtype)


def learning(z: Tensor, log_p: Tensor) -> Tensor:
    """The surrogate's loss: KL from the victim's answers as they are."""
    return kd_term(z, log_p, 1.0)


def rises(surrogate: nn.Module, x: Tensor) -> Tensor:
    """<grad log p_k, 1> (N,K) for images `x` and a frozen network in eval mode, over all its weights.

    That is the derivative of log p when all weights rise equally: one forward pass for all classes and images.
    """
    weights = dict(surrogate.named_parameters())

    def log_p(weights: dict[str, Tensor]) -> Tensor:
        z: Tensor = functional_call(surrogate, weights, (x,))
        return z.log_softmax(dim=1)

    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    with torch.autocast(x.device.type, enabled=False):  # under autocast, torch loses the dtype of the slopes
        slopes: Tensor = jvp(log_p, (weights,), (ones,))[1]
    return slopes


def moved(y: Tensor, rise: Tensor, most: float) -> Tensor:
    """Move up to `most` of `y` (N,K) on the simplex from the classes of least `rise` (N,K) to the class of most."""
    order = rise.argsort(dim=1, stable=True)
    worse, best = y.gather(1, order).split([y.shape[1] - 1, 1], dim=1)
    total = worse.cumsum(dim=1)
    taken = total[:, -1:].clamp_max(most)
    left = torch.minimum((total - taken).clamp_min(0), worse)  # 0 and not nearly 0 where all was taken
    return torch.zeros_like(y).scatter(1, order, torch.cat([left, (best + taken).clamp_max(1)], dim=1))
