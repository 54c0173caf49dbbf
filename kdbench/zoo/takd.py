"""Networks of Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020.

Teachers, assistants and students of graded sizes: plane CNNs, whose number counts convolutions, and ResNets.
"""

from dataclasses import dataclass

from torch import nn

from .layers import Network, Shape, at_least, averaging, he_normal, normed, stage
from .residual import basic


def takd_plane_2(shape: Shape, classes: int) -> nn.Module:
    """The plane CNN with 2 convolutions."""
    return _plane(shape, classes, 2)


def takd_plane_4(shape: Shape, classes: int) -> nn.Module:
    """The plane CNN with 4 convolutions."""
    return _plane(shape, classes, 4)


def takd_plane_6(shape: Shape, classes: int) -> nn.Module:
    """The plane CNN with 6 convolutions."""
    return _plane(shape, classes, 6)


def takd_plane_8(shape: Shape, classes: int) -> nn.Module:
    """The plane CNN with 8 convolutions and a hidden layer."""
    return _plane(shape, classes, 8)


def takd_plane_10(shape: Shape, classes: int) -> nn.Module:
    """The plane CNN with 10 convolutions and a hidden layer."""
    return _plane(shape, classes, 10)


def takd_resnet_8(shape: Shape, classes: int) -> nn.Module:
    """ResNet-8 for CIFAR: three stages of 1 block."""
    return _resnet(shape, classes, 1)


def takd_resnet_14(shape: Shape, classes: int) -> nn.Module:
    """ResNet-14 for CIFAR: three stages of 2 blocks."""
    return _resnet(shape, classes, 2)


def takd_resnet_20(shape: Shape, classes: int) -> nn.Module:
    """ResNet-20 for CIFAR: three stages of 3 blocks."""
    return _resnet(shape, classes, 3)


def takd_resnet_26(shape: Shape, classes: int) -> nn.Module:
    """ResNet-26 for CIFAR: three stages of 4 blocks."""
    return _resnet(shape, classes, 4)


def takd_resnet_32(shape: Shape, classes: int) -> nn.Module:
    """ResNet-32 for CIFAR: three stages of 5 blocks."""
    return _resnet(shape, classes, 5)


def takd_resnet_44(shape: Shape, classes: int) -> nn.Module:
    """ResNet-44 for CIFAR: three stages of 7 blocks."""
    return _resnet(shape, classes, 7)


def takd_resnet_56(shape: Shape, classes: int) -> nn.Module:
    """ResNet-56 for CIFAR: three stages of 9 blocks."""
    return _resnet(shape, classes, 9)


def takd_resnet_110(shape: Shape, classes: int) -> nn.Module:
    """ResNet-110 for CIFAR: three stages of 18 blocks."""
    return _resnet(shape, classes, 18)


@dataclass(frozen=True)
class Layout:
    """Widths of 3x3 convolutions, in groups of which the first `pools` end in a max-pool; width of a hidden layer, or 0."""

    groups: tuple[tuple[int, ...], ...]
    pools: int
    hidden: int = 0


CIFAR10 = {
    2: Layout(((16,), (16,)), pools=2),
    4: Layout(((16, 16), (32, 32)), pools=2),
    6: Layout(((16, 16), (32, 32), (64, 64)), pools=3),
    8: Layout(((16, 16), (32, 32), (64, 64), (128, 128)), pools=4, hidden=64),
    10: Layout(((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)), pools=4, hidden=128),
}
CIFAR100 = {
    2: Layout(((32,), (32,)), pools=2),
    4: Layout(((32, 32), (64, 64)), pools=2),
    6: Layout(((32, 32), (64, 64), (128, 128)), pools=2),
    8: Layout(((32, 32), (64, 64), (128, 128), (256, 256)), pools=4, hidden=64),
    10: Layout(((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)), pools=4, hidden=512),
}


def _plane(shape: Shape, classes: int, convolutions: int) -> nn.Module:
    """The paper's layout for CIFAR-10 up to 10 classes, its layout for CIFAR-100 for more."""
    layout = (CIFAR10 if classes <= 10 else CIFAR100)[convolutions]
    shrunk = 2**layout.pools
    at_least(shape, shrunk, f"takd-plane-{convolutions}")
    width = layout.groups[-1][-1] * (shape[1] // shrunk) * (shape[2] // shrunk)
    features = [*_convolutions(shape[0], layout), nn.Flatten()]
    if layout.hidden:
        features += [nn.Linear(width, layout.hidden), nn.ReLU(inplace=True)]
    return Network(nn.Sequential(*features), nn.Linear(layout.hidden or width, classes))


def _convolutions(inputs: int, layout: Layout) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number, widths in enumerate(layout.groups):
        for outputs in widths:
            layers += [*normed(inputs, outputs, 3, bias=True), nn.ReLU(inplace=True)]
            inputs = outputs
        if number < layout.pools:
            layers.append(nn.MaxPool2d(2))
    return layers


def _resnet(shape: Shape, classes: int, blocks: int) -> nn.Module:
    """Basic blocks throughout, whatever the depth; shortcuts that change shape are 1x1 convolutions with batch norm."""
    layers = [*normed(shape[0], 16, 3), nn.ReLU(inplace=True)]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers.append(stage(basic, inputs, outputs, blocks, stride))
    network = averaging(layers, 64, classes)
    he_normal(network)
    return network
