"""The two networks of defensive distillation: Papernot et al., S&P 2016, as in Mandal & Gao, arXiv 2305.08076, 2023."""

from torch import nn

from .layers import Network, Shape, at_least


def distillation_mnist(shape: Shape, classes: int) -> nn.Module:
    """The network for MNIST: convolutions 32, 32, 64, 64, hidden layers of 200."""
    return _network(shape, classes, "distillation-mnist", (32, 64), 200)


def distillation_cifar10(shape: Shape, classes: int) -> nn.Module:
    """The network for CIFAR-10: convolutions 64, 64, 128, 128, hidden layers of 256."""
    return _network(shape, classes, "distillation-cifar10", (64, 128), 256)


def _network(shape: Shape, classes: int, name: str, widths: tuple[int, int], hidden: int) -> nn.Module:
    """Twice two 3x3 convolutions without padding and a max-pool; two hidden layers, dropout after the first."""
    at_least(shape, 16, name)
    channels, height, width = shape
    features = nn.Sequential(
        *_halving(channels, widths[0]),
        *_halving(widths[0], widths[1]),
        nn.Flatten(),
        nn.Linear(widths[1] * _left(height) * _left(width), hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
    )
    network = Network(features, nn.Linear(hidden, classes))
    _glorot(network)
    return network


def _halving(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]


def _left(pixels: int) -> int:
    """What two times (two convolutions, each taking 2 pixels, and a pool) leave of a side."""
    return ((pixels - 4) // 2 - 4) // 2


def _glorot(network: nn.Module) -> None:
    """Glorot's uniform weights and biases of 0, in place: the official code is in Keras, where they are the default."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
