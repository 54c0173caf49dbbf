"""Accuracy and fidelity: shares of images, counted over all of them, as functions of predicted labels."""

from torch import Tensor

from kdbench.errors import KdbenchError


def accuracy(predicted: Tensor, y: Tensor) -> float:
    """The share of predicted labels (N,) that equal the true ones `y` (N,), in [0,1].

    Raises `KdbenchError` when there are no images.
    """
    return share(predicted == y)


def fidelity(student: Tensor, served: Tensor) -> float:
    """The share of images to which student and served victim give the same label, right or wrong; both (N,).

    Jagielski et al. 2020, "High Accuracy and High Fidelity Extraction of Neural Networks".
    Raises `KdbenchError` when there are no images.
    """
    return share(student == served)


def share(hits: Tensor) -> float:
    """The share of true values in `hits` (N,). Raises `KdbenchError` when there are none at all."""
    if not len(hits):
        raise KdbenchError("there are no images to evaluate on: a data set needs validation and test images")
    return int(hits.sum()) / len(hits)
