"""What a service releases: how uncertain its answers are, how far from the model's own, and whether they repeat."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.evaluation.accuracy import share
from kdbench.evaluation.network import frozen_in_eval_mode
from kdbench.game.threat import Service

REPEATED = 256  # test images that are asked about twice
SAME = 1e-4  # largest difference between two answers to one question, as probabilities, that is rounding


@dataclass(frozen=True)
class Answers:
    """Probabilities (N,K) for the same images: a service's `first` answers, those to the same question asked `again`
    in another order, and the `own` answers of the model behind it."""

    first: Tensor
    again: Tensor
    own: Tensor


def ask_twice(model: nn.Module, service: Service, x: Tensor) -> Answers:
    """The answers to the first `REPEATED` of images `x` (N,C,H,W); the second time in reverse order."""
    part = x[:REPEATED]
    with torch.no_grad(), frozen_in_eval_mode(model):
        first, again = service(part).exp(), service(part.flip(0)).flip(0).exp()
        return Answers(first, again, model(part).softmax(dim=1))


def entropy(answers: Answers) -> float:
    """Mean entropy of the answers, in nats, between 0 and log K."""
    return float(torch.special.entr(answers.first).sum(dim=1).mean())


def distortion(answers: Answers) -> float:
    """Mean L1 distance of the answers from the model's own, between 0 and 2."""
    return float((answers.first - answers.own).abs().sum(dim=1).mean())


def consistency(answers: Answers) -> float:
    """The share of images that get the same answer, up to `SAME`, when they are asked about again."""
    return share((answers.first - answers.again).abs().amax(dim=1) <= SAME)
