"""Predictions: made once a network or service, kept, and enough to compute accuracy and fidelity from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from simple_networks import FAST, FULL, NONE, Quadrants, as_images, constant, quadrant_images, served
from torch import Tensor, nn

from kdbench.engine.tensors import save_tensors
from kdbench.errors import KdbenchError
from kdbench.evaluation import network as evaluated
from kdbench.evaluation.accuracy import accuracy, fidelity
from kdbench.evaluation.adversarial import Robustness
from kdbench.evaluation.evaluate import evaluate_against, evaluate_student, evaluate_victim
from kdbench.evaluation.predictions import BATCH, Predictions, predict_network, predict_service
from kdbench.game.data import Images, Split
from kdbench.game.threat import Service


class Counting(nn.Module):
    """A network that counts how often each of the images in its list was among what it was asked about."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.network, self._x = Quadrants(), x
        self.counts = torch.zeros(len(x))

    def forward(self, x: Tensor) -> Tensor:
        same = (x[:, None] == self._x[None]).flatten(2).all(dim=2)
        self.counts += same.sum(dim=0)
        z: Tensor = self.network(x)
        return z


def distinct(count: int, radius: float) -> Split:
    """Images no two of which are equal, with the labels of their quadrants."""
    data = quadrant_images(count, radius)
    return Split(data.x + torch.linspace(0, 0.01, count)[:, None, None, None], data.y, 4)


def images(test: int, validation: int) -> Images:
    """A data set in which no image of a split is one of another."""
    return Images(quadrant_images(4), distinct(validation, 0.05), distinct(test, 0.1))


def test_predictions_of_a_network_are_its_largest_logits_over_all_batches() -> None:
    data = images(BATCH + 3, 5)
    predictions = predict_network(Quadrants(), data)
    assert torch.equal(predictions.test, data.test.y)
    assert torch.equal(predictions.validation, data.validation.y)
    assert predictions.test.dtype == torch.int64
    assert predictions.confidence is None


def test_the_confidence_of_a_service_is_its_largest_probability() -> None:
    data = images(BATCH + 3, 5)
    predictions = predict_service(served(Quadrants()), data)
    expected = Quadrants()(data.test.x).softmax(dim=1).amax(dim=1)
    assert predictions.confidence is not None
    assert predictions.confidence.dtype == torch.float32
    torch.testing.assert_close(predictions.confidence, expected.detach())
    assert torch.equal(predictions.test, data.test.y)


@pytest.mark.parametrize("confidence", [None, torch.tensor([0.5, 1.0])])
def test_predictions_survive_a_file(confidence: Tensor | None, tmp_path: Path) -> None:
    predictions = Predictions(torch.tensor([3, 1]), torch.tensor([2]), confidence)
    save_tensors(predictions.to_tensors(), tmp_path / "predictions.safetensors")
    read = Predictions.from_tensors(load_file(tmp_path / "predictions.safetensors"))
    assert torch.equal(read.test, predictions.test)
    assert torch.equal(read.validation, predictions.validation)
    assert (read.confidence is None) == (confidence is None)
    assert confidence is None or torch.equal(read.confidence, confidence)  # type: ignore[arg-type]


def test_accuracies_and_fidelity_can_be_recomputed_from_kept_predictions() -> None:
    data = images(10, 6)
    data.test.y[:3] = (data.test.y[:3] + 1) % 4
    student = evaluate_student(constant(4, 16), data, NONE, 0)
    victim = evaluate_victim(Quadrants(), served(Quadrants()), data, NONE, 0)
    together = evaluate_against(student, served(Quadrants()), victim.predictions.test, data, NONE, 0)
    assert victim.metrics["victim_acc"] == accuracy(victim.predictions.test, data.test.y) == 7 / 10
    assert victim.metrics["victim_val_acc"] == accuracy(victim.predictions.validation, data.validation.y) == 1.0
    assert student.metrics["student_acc"] == accuracy(student.predictions.test, data.test.y)
    assert together["fidelity"] == fidelity(student.predictions.test, victim.predictions.test) == 3 / 10


def test_accuracy_and_fidelity_of_no_images_are_refused() -> None:
    none = torch.empty(0, dtype=torch.long)
    for measure in (accuracy, fidelity):
        with pytest.raises(KdbenchError, match="no images to evaluate on"):
            measure(none, none)


def test_a_student_predicts_each_image_once() -> None:
    data = images(40, 7)
    network = Counting(data.test.x)
    evaluate_student(network, data, NONE, 0)
    assert network.counts.tolist() == [1.0] * 40


def test_a_service_is_asked_once_about_the_images_of_an_accuracy() -> None:
    data = images(300, 7)
    network = Counting(data.test.x)
    evaluate_victim(Quadrants(), served(network), data, NONE, 0)
    assert network.counts.tolist() == [3.0] * 256 + [1.0] * 44  # twice more for consistency


@pytest.mark.parametrize(("robustness", "times"), [(NONE, 0), (FAST, 1), (FULL, 1)], ids=["none", "fast", "full"])
def test_a_network_is_folded_once_an_evaluation(
    robustness: Robustness, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded, made = evaluated.folded, []

    def counted(network: nn.Module, x: Tensor) -> nn.Module:
        made.append(network)
        return folded(network, x)

    monkeypatch.setattr(evaluated, "folded", counted)
    data, service = as_images(quadrant_images()), served(Quadrants())
    student = evaluate_student(Quadrants(), data, robustness, 0)
    evaluate_against(student, service, student.predictions.test, data, robustness, 0)
    assert len(made) == times
    evaluate_victim(Quadrants(), service, data, robustness, 0)
    assert len(made) == 2 * times


def test_splits_that_an_evaluation_does_not_need_are_not_read() -> None:
    read: list[str] = []

    def load(name: str) -> Split:
        read.append(name)
        return quadrant_images()

    service: Service = served(Quadrants())
    student = evaluate_student(Quadrants(), Images.lazy(load), FAST, 0)
    evaluate_against(student, service, student.predictions.test, Images.lazy(load), FAST, 0)
    assert sorted(read) == ["test", "test", "validation"]
