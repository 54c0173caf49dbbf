"""The referee: scores victims and students on images that no player has seen. Accuracies are counts over all."""

import torch
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.evaluation.adversarial import Robustness, adversarial, frozen_in_eval_mode, labels, sensitivity, transfer
from kdbench.game.data import Images, Split
from kdbench.game.threat import Service

REPEATED = 256  # test images whose questions are repeated
ALIKE = 1e-4  # rounding that may tell two answers to one question apart, as probabilities


def evaluate_victim(
    model: nn.Module, service: Service, images: Images, robustness: Robustness, seed: int
) -> dict[str, float]:
    """Metrics of a defended victim: accuracy as `service` answers; evasion of the hardened `model`, its weights known.

    Raises `KdbenchError` when there is nothing to judge on.
    """
    scores = {
        "victim_acc": _share(labels(service, images.test.x) == images.test.y),
        "victim_val_acc": _share(labels(service, images.validation.x) == images.validation.y),
        "victim_parameters": float(parameters(model)),
    }
    scores |= _answers(model, service, images.test.x)
    return scores | _under_attack("victim", model, images.test, robustness, seed)


def evaluate_student(student: nn.Module, images: Images, robustness: Robustness, seed: int) -> dict[str, float]:
    """Metrics of a student by itself: accuracy, and evasion with its weights known.

    Raises `KdbenchError` when there is nothing to judge on.
    """
    with frozen_in_eval_mode(student):
        predicted = labels(student, images.test.x)
        scores = {
            "student_acc": _share(predicted == images.test.y),
            "student_val_acc": _share(labels(student, images.validation.x) == images.validation.y),
            "student_parameters": float(parameters(student)),
        }
    return scores | _under_attack("student", student, images.test, robustness, seed, predicted=predicted)


def evaluate_against(
    student: nn.Module, service: Service, images: Images, robustness: Robustness, seed: int
) -> dict[str, float]:
    """Metrics of a student beside the victim as served, by a service that the thief has not touched.

    Each test image is asked once, and once more as an adversarial example. Raises `KdbenchError` without test images.
    """
    served = labels(service, images.test.x)
    with frozen_in_eval_mode(student):
        scores = {"fidelity": _share(labels(student, images.test.x) == served)}
    if robustness.level != "none":
        scores["transfer"] = transfer(student, service, images.test, robustness, seed, served=served)
    return scores


def parameters(network: nn.Module) -> int:
    """How many weights a network has that training may change."""
    return sum(parameter.numel() for parameter in network.parameters())


def _answers(model: nn.Module, service: Service, x: Tensor) -> dict[str, float]:
    """What is released for images `x` (N,C,H,W), and whether a repeated question gets the same answer.

    entropy: mean, in nats. distortion: mean L1 distance of the answers from the model's own. repeat: share of questions
    answered alike when they are put once more, in another order.
    """
    part = x[:REPEATED]
    with torch.no_grad(), frozen_in_eval_mode(model):
        first, again = service(part).exp(), service(part.flip(0)).flip(0).exp()
        own = model(part).softmax(dim=1)
    alike = (first - again).abs().amax(dim=1) <= ALIKE
    return {
        "victim_entropy": float(torch.special.entr(first).sum(dim=1).mean()),
        "victim_distortion": float((first - own).abs().sum(dim=1).mean()),
        "victim_consistency": _share(alike),
    }


def _under_attack(
    who: str, model: nn.Module, test: Split, robustness: Robustness, seed: int, *, predicted: Tensor | None = None
) -> dict[str, float]:
    if robustness.level == "none":
        return {}
    scores = adversarial(model, test, robustness, seed, predicted=predicted) | {
        "sensitivity": sensitivity(model, test.x)
    }
    return {f"{who}_{name}": value for name, value in scores.items()}


def _share(hits: Tensor) -> float:
    if not len(hits):
        raise KdbenchError("there are no images to judge on: a data set needs validation and test images")
    return int(hits.sum()) / len(hits)
