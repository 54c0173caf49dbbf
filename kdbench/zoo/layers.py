"""What several networks share. A factory takes the shape (C,H,W) of an image and the number of classes."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from kdbench.api import KdbenchError

Shape = tuple[int, int, int]
Block = Callable[[int, int, int], nn.Module]  # channels in, channels out, stride


class Network(nn.Module):
    """Features of an image as one row, and a classifier that makes logits of them."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W), standardised -> logits (N,K)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def averaging(layers: Iterable[nn.Module], width: int, classes: int) -> Network:
    """The network that averages each of the `width` maps of `layers` over the image: it takes images of any size."""
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Network(features, nn.Linear(width, classes))


def stage(block: Block, inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks in a row, of which the first changes the channels and strides."""
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(blocks - 1)))


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution of odd `size`, padded so that only its stride shrinks the image."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def normed(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution and its batch norm."""
    return [convolution(inputs, outputs, size, stride, groups, bias), nn.BatchNorm2d(outputs)]


def he_normal(network: nn.Module) -> None:
    """Draw convolutions from N(0, 2 / (size^2 outputs)), in place, their biases 0: He et al. 2015, "Delving Deep ..."."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def at_least(shape: Shape, pixels: int, name: str) -> None:
    """Raise `KdbenchError` when an image of `shape` is narrower than `pixels`: pooling would leave nothing of it."""
    _, height, width = shape
    if min(height, width) < pixels:
        raise KdbenchError(f"The network '{name}' needs images of {pixels}x{pixels} or more, not {height}x{width}.")
