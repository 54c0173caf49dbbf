"""ResNeXt: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017."""

from torch import nn

from .layers import Shape, averaging, he_normal, normed, stage
from .residual import squeezed

CARDINALITY = 8
WIDTHS = (256, 512, 1024)


def resnext_29(shape: Shape, classes: int) -> nn.Module:
    """ResNeXt-29 (8x64d) for small images: three stages of 3 blocks, the 3x3 convolutions in 8 groups."""
    layers = [*normed(shape[0], 64, 3), nn.ReLU(inplace=True)]
    for inputs, outputs, stride in zip((64, *WIDTHS[:2]), WIDTHS, (1, 2, 2), strict=True):
        layers.append(stage(_block, inputs, outputs, 3, stride))
    network = averaging(layers, WIDTHS[-1], classes)
    he_normal(network)
    nn.init.kaiming_normal_(network.classifier.get_parameter("weight"), nonlinearity="relu")
    nn.init.zeros_(network.classifier.get_parameter("bias"))
    return network


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    # 8x64d: a group is 64 wide where the block gives 256 channels, and widens with it.
    return squeezed(inputs, outputs, stride, CARDINALITY * outputs // 4, CARDINALITY)
