"""Evaluates victims and students on images that no defense and no attack has seen."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from kdbench.evaluation.accuracy import accuracy, fidelity
from kdbench.evaluation.adversarial import Robustness, adversarial_accuracies
from kdbench.evaluation.answers import ask_twice, consistency, distortion, entropy
from kdbench.evaluation.carlini_wagner import carlini_wagner
from kdbench.evaluation.network import EvaluatedNetwork, frozen_in_eval_mode
from kdbench.evaluation.predictions import Predictions, predict_labels, predict_network, predict_service
from kdbench.evaluation.sensitivity import sensitivity
from kdbench.evaluation.transfer import transfer
from kdbench.game.data import Images
from kdbench.game.threat import Service

Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a victim or a student, the predicted labels it was measured from, and the network."""

    metrics: Metrics
    predictions: Predictions
    network: EvaluatedNetwork = field(repr=False)


def evaluate_victim(
    model: nn.Module, service: Service, images: Images, robustness: Robustness, seed: int
) -> Evaluation:
    """Metrics of a defended victim: accuracy and answers of `service`, adversarial robustness of the hardened `model`.

    The robustness is that of a network whose weights are known. Test and validation images are asked once, some test
    images twice more. Raises `KdbenchError` when there are no images to evaluate on.
    """
    predictions = predict_service(service, images)
    metrics = {
        "victim_acc": accuracy(predictions.test, images.test.y),
        "victim_val_acc": accuracy(predictions.validation, images.validation.y),
        "victim_parameters": float(parameters(model)),
    }
    answers = ask_twice(model, service, images.test.x)
    metrics |= {
        "victim_entropy": entropy(answers),
        "victim_distortion": distortion(answers),
        "victim_consistency": consistency(answers),
    }
    network = EvaluatedNetwork(model, images.test.x)
    if robustness.level != "none":
        with frozen_in_eval_mode(model):
            predicted = predict_labels(model, images.test.x)
        metrics |= _white_box("victim", network, predicted, images, robustness, seed)
    return Evaluation(metrics, predictions, network)


def evaluate_student(student: nn.Module, images: Images, robustness: Robustness, seed: int) -> Evaluation:
    """Metrics of a student by itself: accuracy, and adversarial robustness when its weights are known.

    Raises `KdbenchError` when there are no images to evaluate on.
    """
    predictions = predict_network(student, images)
    metrics = {
        "student_acc": accuracy(predictions.test, images.test.y),
        "student_val_acc": accuracy(predictions.validation, images.validation.y),
        "student_parameters": float(parameters(student)),
    }
    network = EvaluatedNetwork(student, images.test.x)
    if robustness.level != "none":
        metrics |= _white_box("student", network, predictions.test, images, robustness, seed)
    return Evaluation(metrics, predictions, network)


def evaluate_against(
    student: Evaluation, service: Service, served: Tensor, images: Images, robustness: Robustness, seed: int
) -> Metrics:
    """Metrics of a student beside the victim as served, by a service that the attack has not asked anything.

    served: the labels (N,) that the service gives to the test images. The service is asked about adversarial examples
    only. Raises `KdbenchError` when there are no test images.
    """
    metrics = {"fidelity": fidelity(student.predictions.test, served)}
    if robustness.level != "none":
        metrics["transfer"] = transfer(student.network, service, served, images.test, robustness, seed)
    return metrics


def parameters(network: nn.Module) -> int:
    """How many weights of a network training may change."""
    return sum(parameter.numel() for parameter in network.parameters())


def _white_box(
    side: str, network: EvaluatedNetwork, predicted: Tensor, images: Images, robustness: Robustness, seed: int
) -> Metrics:
    """What is measured of a network with its weights known; side: the prefix of the metrics' names."""
    values = adversarial_accuracies(network, images.test, predicted, robustness, seed)
    values |= carlini_wagner(network, images.test, predicted, robustness)
    values["sensitivity"] = sensitivity(network, images.test.x)
    return {f"{side}_{name}": value for name, value in values.items()}
