"""MobileNetV2: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018."""

from torch import Tensor, nn

from .layers import Shape, averaging, normed, stage

# Channels, blocks, stride of the stages that expand.
STAGES = ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 1), (320, 1, 1))


def mobilenetv2(shape: Shape, classes: int) -> nn.Module:
    """The MobileNetV2 of Ma et al., "Undistillable", ICLR 2021, for small images.

    Its stem is a 1x1 convolution with a padding of 1 (32x32 becomes 34x34), its convolutions have biases. The last of
    them, 1x1 on the averages, is a linear layer here: the same function, initialised alike.
    """
    layers = [nn.Conv2d(shape[0], 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6(inplace=True), Inverted(32, 16, 1, 1)]
    inputs = 16
    for outputs, blocks, stride in STAGES:
        layers.append(stage(Inverted, inputs, outputs, blocks, stride))
        inputs = outputs
    layers += [*normed(inputs, 1280, 1, bias=True), nn.ReLU6(inplace=True)]
    return averaging(layers, 1280, classes)


class Inverted(nn.Module):
    """1x1 up to `expansion` times the channels, 3x3 on each by itself, 1x1 down, not activated; a shortcut where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 6) -> None:
        super().__init__()
        inner = expansion * inputs
        self.adds = stride == 1 and inputs == outputs
        self.branch = nn.Sequential(
            *normed(inputs, inner, 1, bias=True),
            nn.ReLU6(inplace=True),
            *normed(inner, inner, 3, stride, groups=inner, bias=True),
            nn.ReLU6(inplace=True),
            *normed(inner, outputs, 1, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N,C,H,W) -> maps of the block's channels."""
        maps: Tensor = self.branch(x)
        return maps + x if self.adds else maps
