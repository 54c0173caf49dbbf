"""The plain CNN with 32 channels: the small student of Ma et al., "Undistillable", ICLR 2021, on CIFAR-10."""

from torch import nn

from .layers import Network, Shape, at_least, normed

WIDTH = 32


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Three 3x3 convolutions of 32, 64 and 128 channels, each halved by a max-pool, and a hidden layer of 128.

    The hidden layer sees the flattened maps (4x4 for CIFAR), so that it grows with the image. The official code's
    dropout is 0 in all its settings, and left out.
    """
    at_least(shape, 8, "cnn")
    channels, height, width = shape
    features = nn.Sequential(
        *_halving(channels, WIDTH),
        *_halving(WIDTH, 2 * WIDTH),
        *_halving(2 * WIDTH, 4 * WIDTH),
        nn.Flatten(),
        nn.Linear(4 * WIDTH * (height // 8) * (width // 8), 4 * WIDTH),
        nn.BatchNorm1d(4 * WIDTH),
        nn.ReLU(inplace=True),
    )
    return Network(features, nn.Linear(4 * WIDTH, classes))


def _halving(inputs: int, outputs: int) -> list[nn.Module]:
    return [*normed(inputs, outputs, 3, bias=True), nn.MaxPool2d(2), nn.ReLU(inplace=True)]
