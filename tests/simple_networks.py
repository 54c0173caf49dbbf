"""Networks and images whose margins are known by arithmetic, for tests of evaluation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.evaluation.adversarial import Robustness, adversarial_accuracies
from kdbench.evaluation.carlini_wagner import carlini_wagner
from kdbench.evaluation.evaluate import evaluate_against, evaluate_student
from kdbench.evaluation.network import EvaluatedNetwork
from kdbench.evaluation.predictions import predict_labels
from kdbench.game.data import Images, Split
from kdbench.game.threat import Service

NONE, FAST = Robustness(level="none"), Robustness()
LEVELS: tuple[Literal["none", "fast", "more", "full"], ...] = ("none", "fast", "more", "full")
# The published steps and queries, cut to seconds.
FULL = Robustness(level="full", autoattack_steps=10, autoattack_queries=200, square_queries=200)
RADIUS = 0.05


INVALID: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "outside the ball": lambda x, y: 1 - x,
    "no image": lambda x, y: 0.5 - 20 * (x - 0.5),
    "not a number": lambda x, y: torch.full_like(x, torch.nan),
    "the image itself": lambda x, y: x.clone(),
}
"""Attacks whose results do not count, whatever the network says to them."""


class Quadrants(nn.Module):
    """A linear network on images Cx4x4 for four classes: the logit of a class is `scale` times the mean of its quadrant.

    Quadrants differ in one class minus another by a weight of L1 norm 2 and squared L2 norm 1/2 (times scale).
    """

    def __init__(self, channel: int = 0, scale: float = 10.0, shift: float = 0.0) -> None:
        super().__init__()
        self.channel, self.shift = channel, shift
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        quadrants = F.avg_pool2d(x[:, self.channel : self.channel + 1], 2).flatten(1)
        return self.scale * quadrants + self.shift


class Affine(nn.Module):
    """Logits W x + b for images of any shape; `weight` (K,pixels), `bias` (K,)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Means(nn.Module):
    """Logits of two classes: `steepness` times (the mean of the image - 0.5), and 0. Class 0 leads above mid-grey."""

    def __init__(self, steepness: float = 1.0) -> None:
        super().__init__()
        self.steepness = steepness

    def forward(self, x: Tensor) -> Tensor:
        mean = self.steepness * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([mean, torch.zeros_like(mean)], dim=1)


def quadrant_images(count: int = 12, radius: float = RADIUS, channels: int = 1) -> Split:
    """Images whose own quadrant lies `radius` above mid-grey and the others below: the L-inf margin is `radius`."""
    y = torch.arange(count) % 4
    own = F.one_hot(y, 4).reshape(-1, 1, 2, 2).float()
    x = 0.5 + radius * (2 * own - 1)
    return Split(x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, channels, 1, 1), y, 4)


def as_images(test: Split) -> Images:
    """A data set with the same images in all splits."""
    return Images(test, test, test)


def served(model: nn.Module) -> Service:
    """The service of an undefended model."""
    return lambda x: model(x).log_softmax(dim=1)


def constant(classes: int = 3, pixels: int = 64) -> nn.Module:
    """Always answers class 0."""
    return Affine(torch.zeros(classes, pixels), F.one_hot(torch.tensor(0), classes).float())


def under_attack(network: nn.Module, data: Split, robustness: Robustness, seed: int = 0) -> dict[str, float]:
    """Adversarial accuracies and C&W of `network` on `data`."""
    evaluated, predicted = EvaluatedNetwork(network, data.x), predict_labels(network, data.x)
    accuracies = adversarial_accuracies(evaluated, data, predicted, robustness, seed)
    return accuracies | carlini_wagner(evaluated, data, predicted, robustness)


def beside(
    student: nn.Module, service: Service, data: Split, robustness: Robustness, seed: int = 0
) -> dict[str, float]:
    """Fidelity, and transfer above level "none", of `student` beside `service` on `data`."""
    images = as_images(data)
    evaluation = evaluate_student(student, images, replace(robustness, level="none"), seed)
    return evaluate_against(evaluation, service, predict_labels(service, data.x), images, robustness, seed)
