"""Small networks for small images. A factory takes the shape (C,H,W) of an image and the number of classes."""

from torch import Tensor, nn

Shape = tuple[int, int, int]


def mini_8(shape: Shape, classes: int) -> nn.Module:
    """The mini network with 8 channels."""
    return Mini(shape[0], classes, 8)


def mini_16(shape: Shape, classes: int) -> nn.Module:
    """The mini network with 16 channels."""
    return Mini(shape[0], classes, 16)


def mini_32(shape: Shape, classes: int) -> nn.Module:
    """The mini network with 32 channels."""
    return Mini(shape[0], classes, 32)


class Mini(nn.Module):
    """Three 3x3 convolutions with batch norm, the second one strided, a global average, a linear layer: for 8x8 images."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(channels, width, stride=1),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 2 * width, stride=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
