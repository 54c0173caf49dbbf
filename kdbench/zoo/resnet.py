"""ResNets for small images, as the Nasty Teacher's repository has them: He et al., CVPR 2016, with a 3x3 stem."""

from torch import nn

from .layers import Block, Shape, averaging, normed, stage
from .residual import basic, bottleneck


def resnet_18(shape: Shape, classes: int) -> nn.Module:
    """ResNet-18 for small images."""
    return _resnet(shape, classes, basic, (2, 2, 2, 2), (64, 128, 256, 512))


def resnet_34(shape: Shape, classes: int) -> nn.Module:
    """ResNet-34 for small images."""
    return _resnet(shape, classes, basic, (3, 4, 6, 3), (64, 128, 256, 512))


def resnet_50(shape: Shape, classes: int) -> nn.Module:
    """ResNet-50 for small images."""
    return _resnet(shape, classes, bottleneck, (3, 4, 6, 3), (256, 512, 1024, 2048))


def _resnet(
    shape: Shape, classes: int, block: Block, blocks: tuple[int, int, int, int], widths: tuple[int, int, int, int]
) -> nn.Module:
    """A stem that keeps the image's size, without max-pool, and four stages, all but the first halving it."""
    layers = [*normed(shape[0], 64, 3), nn.ReLU(inplace=True)]
    for inputs, outputs, count, stride in zip((64, *widths[:3]), widths, blocks, (1, 2, 2, 2), strict=True):
        layers.append(stage(block, inputs, outputs, count, stride))
    return averaging(layers, widths[-1], classes)
