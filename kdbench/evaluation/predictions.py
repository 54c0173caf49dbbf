"""Predicted labels, made once a network or service and kept: accuracy, fidelity and the rest are functions of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.evaluation.network import frozen_in_eval_mode
from kdbench.game.data import Images
from kdbench.game.threat import Service

BATCH = 512  # images asked at once; part of the protocol: the early stop of C&W depends on it


@dataclass(frozen=True)
class Predictions:
    """The labels that a network or a service gives to the test and validation images of a data set.

    test (N,), validation (M,): int64. confidence (N,): float32, the largest probability in the answer to each test
    image, in [0,1]; None for a network that nobody asks for probabilities.
    """

    test: Tensor
    validation: Tensor
    confidence: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """The predictions by name, on the CPU, to be written to a file."""
        tensors = {"test": self.test, "validation": self.validation}
        if self.confidence is not None:
            tensors["confidence"] = self.confidence
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Predictions":
        """The predictions that `to_tensors` gave."""
        return cls(tensors["test"], tensors["validation"], tensors.get("confidence"))


def predict_network(network: nn.Module, images: Images) -> Predictions:
    """The predictions of `network` (images -> logits) in eval mode; its modes are put back afterwards."""
    with frozen_in_eval_mode(network):
        return Predictions(predict_labels(network, images.test.x), predict_labels(network, images.validation.x))


def predict_service(service: Service, images: Images) -> Predictions:
    """The predictions of a service, with its confidence in the test images; each image is asked once."""
    labels, confidences = [], []
    with torch.no_grad():
        for part in torch.split(images.test.x, BATCH):
            log_p = service(part)
            labels.append(log_p.argmax(dim=1))
            confidences.append(log_p.amax(dim=1).exp().float())
    return Predictions(torch.cat(labels), predict_labels(service, images.validation.x), torch.cat(confidences))


def predict_labels(answer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The class (N,) with the largest answer to each of images `x` (N,C,H,W), from a service or a network."""
    with torch.no_grad():
        return torch.cat([answer(part).argmax(dim=1) for part in torch.split(x, BATCH)])
