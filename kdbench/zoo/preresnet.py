"""Pre-activation ResNets, the "ResNetC" of Ma et al., "Undistillable", ICLR 2021 (He et al., "Identity Mappings", 2016).

The names are the official code's: from 44 on it takes bottleneck blocks, as many as a net of that name has basic ones,
so that those nets have half as many layers again.
"""

from torch import Tensor, nn

from .layers import Block, Shape, averaging, convolution, he_normal, stage


def preresnet_20(shape: Shape, classes: int) -> nn.Module:
    """PreResNet-20: three stages of 3 basic blocks."""
    return _preresnet(shape, classes, preactivated_basic, 3, expansion=1)


def preresnet_32(shape: Shape, classes: int) -> nn.Module:
    """PreResNet-32: three stages of 5 basic blocks."""
    return _preresnet(shape, classes, preactivated_basic, 5, expansion=1)


def preresnet_44(shape: Shape, classes: int) -> nn.Module:
    """The official code's PreResNet-44: three stages of 7 bottleneck blocks, in truth 65 layers."""
    return _preresnet(shape, classes, preactivated_bottleneck, 7, expansion=4)


def preresnet_56(shape: Shape, classes: int) -> nn.Module:
    """The official code's PreResNet-56: three stages of 9 bottleneck blocks, in truth 83 layers."""
    return _preresnet(shape, classes, preactivated_bottleneck, 9, expansion=4)


def preresnet_110(shape: Shape, classes: int) -> nn.Module:
    """The official code's PreResNet-110: three stages of 18 bottleneck blocks, in truth 164 layers."""
    return _preresnet(shape, classes, preactivated_bottleneck, 18, expansion=4)


def _preresnet(shape: Shape, classes: int, block: Block, blocks: int, expansion: int) -> nn.Module:
    widths = [16 * expansion, 32 * expansion, 64 * expansion]
    layers: list[nn.Module] = [convolution(shape[0], 16, 3)]
    for inputs, outputs, stride in zip((16, *widths[:2]), widths, (1, 2, 2), strict=True):
        layers.append(stage(block, inputs, outputs, blocks, stride))
    layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)]
    network = averaging(layers, widths[-1], classes)
    he_normal(network)
    return network


class PreActivation(nn.Module):
    """branch(x) + shortcut(x), with nothing after the sum; the shortcut sees what entered the block, not activated."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N,C,H,W) -> maps of the block's channels."""
        maps: Tensor = self.branch(x) + self.shortcut(x)
        return maps


def preactivated_basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions, each activated before."""
    branch = nn.Sequential(*_activated(inputs, outputs, 3, stride), *_activated(outputs, outputs, 3))
    return PreActivation(branch, _shortcut(inputs, outputs, stride))


def preactivated_bottleneck(inputs: int, outputs: int, stride: int) -> nn.Module:
    """1x1 down to a quarter of the channels, 3x3 there, 1x1 up again, each activated before."""
    inner = outputs // 4
    branch = nn.Sequential(
        *_activated(inputs, inner, 1),
        *_activated(inner, inner, 3, stride),
        *_activated(inner, outputs, 1),
    )
    return PreActivation(branch, _shortcut(inputs, outputs, stride))


def _activated(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), convolution(inputs, outputs, size, stride)]


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 and inputs == outputs else convolution(inputs, outputs, 1, stride)
