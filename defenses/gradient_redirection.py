"""GRAD2, gradient redirection: Mazeika et al., "How to Steer Your Adversary: Targeted and Efficient Model Stealing
Defenses with Gradient Redirection", ICML 2022, arXiv 2206.14157."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from kdbench.api import Context, Count, Defense, NonNegative, Service, fit, inference, kd_term

from ._ball import room, truth


@dataclass(frozen=True)
class GradientRedirection(Defense):
    """Moves each answer, as far as epsilon lets it, so that whoever learns from it raises all weights at once.

    max <G^T y', 1> such that |y' - y|_1 <= epsilon, where row k of G is the gradient of log p_k in all the weights of a
    surrogate thief. The best answer is found exactly: epsilon / 2 goes to the class whose gradient agrees most with the
    direction, and is taken from those that agree least, emptied one by one. The label may change. The surrogate learns
    the victim's true answers for a few epochs (default: the code's); the direction is the code's main one, all ones.

    Departures: the surrogate learns from the owner's images, by the owner's recipe, not from a thief's queries; its
    schedule is that of so few epochs, where the code stops a longer one early. An emptied class is withheld, where the code
    leaves it 1e-15. Rounding's part is taken off epsilon (2e-6). The default epsilon is our choice, that of the other
    defenses with such a budget; victims that are not sure of much lose most of their labels to it.
    """

    epsilon: NonNegative = 1.0
    epochs: Count = 10

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module:
        surrogate = ctx.new_student()
        fit(surrogate, learning, ctx.data.x, inference(model, ctx), ctx.training(epochs=self.epochs))
        return surrogate

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask = inference(model, ctx)
        surrogate = (ctx.auxiliary or self.auxiliary(model, ctx)).requires_grad_(False)
        return lambda x: self.perturbed(ask(x), rises(surrogate, x))

    def perturbed(self, z: Tensor, rise: Tensor) -> Tensor:
        """Log-probabilities of y' (N,K) from the victim's logits `z` and what each class does for the aim, `rise` (N,K)."""
        return moved(truth(z), rise, room(self.epsilon) / 2).log().to(z.dtype)


def learning(z: Tensor, log_p: Tensor) -> Tensor:
    """The surrogate's loss: KL from the victim's answers as they are."""
    return kd_term(z, log_p, 1.0)


def rises(surrogate: nn.Module, x: Tensor) -> Tensor:
    """<grad log p_k, 1> (N,K) for images `x` and a frozen network in eval mode, over all its weights.

    That is the derivative of log p when all weights rise alike: one forward pass for all classes and images.
    """
    weights = dict(surrogate.named_parameters())

    def log_p(weights: dict[str, Tensor]) -> Tensor:
        z: Tensor = functional_call(surrogate, weights, (x,))
        return z.log_softmax(dim=1)

    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    with torch.autocast(x.device.type, enabled=False):  # in it, torch loses the type of the slopes
        slopes: Tensor = jvp(log_p, (weights,), (ones,))[1]
    return slopes


def moved(y: Tensor, rise: Tensor, most: float) -> Tensor:
    """Of `y` (N,K) on the simplex, take up to `most` from the classes of least `rise` (N,K); the one of most gets it."""
    order = rise.argsort(dim=1, stable=True)
    worse, best = y.gather(1, order).split([y.shape[1] - 1, 1], dim=1)
    total = worse.cumsum(dim=1)
    taken = total[:, -1:].clamp_max(most)
    left = torch.minimum((total - taken).clamp_min(0), worse)  # 0 and not nearly 0 where all was taken
    return torch.zeros_like(y).scatter(1, order, torch.cat([left, (best + taken).clamp_max(1)], dim=1))
