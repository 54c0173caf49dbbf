"""Penultimate features of networks."""

import pytest
import torch
from torch import Tensor, nn

from kdbench import registry
from kdbench.errors import KdbenchError
from kdbench.runs.features import penultimate

NETWORKS = [entry.name for entry in registry.entries("model") if not hasattr(entry.load(), "argument")]


@pytest.mark.parametrize("name", NETWORKS)
def test_penultimate_features_are_what_a_linear_layer_makes_logits_of(name: str) -> None:
    """With 16 classes, as many as some inner 1x1 convolutions have channels."""
    network = registry.load("model", name)((3, 16, 16), 16).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = penultimate(network, x, 16)
    classifier = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        assert torch.allclose(classifier(features), network(x), atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in network.modules())


class Convolved(nn.Module):
    """A classifier that is a convolution, averaged afterwards; it stands before the features."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(5, 3, 1)
        self.features = nn.Conv2d(1, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,1,H,W) -> logits (N,3)."""
        logits: Tensor = self.classifier(self.features(x)).mean((2, 3))
        return logits


def test_a_convolution_may_classify_wherever_it_stands() -> None:
    network, x = Convolved().eval(), torch.rand(300, 1, 8, 8)
    features = penultimate(network, x, 3)
    with torch.no_grad():
        assert torch.allclose(features, network.features(x).mean((2, 3)), atol=1e-6)
        assert torch.allclose(
            features @ network.classifier.weight.flatten(1).T + network.classifier.bias, network(x), atol=1e-5
        )


def test_a_network_without_a_classifier_is_named() -> None:
    with pytest.raises(KdbenchError, match="The network Sequential has no linear layer with 3 outputs"):
        penultimate(nn.Sequential(nn.Flatten()), torch.rand(2, 1, 1, 3), 3)
