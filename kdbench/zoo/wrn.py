"""Wide ResNets: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016; the pairs of the data-free literature."""

from torch import Tensor, nn

from .layers import Shape, averaging, convolution, he_normal, stage


def wrn_16_1(shape: Shape, classes: int) -> nn.Module:
    """WRN-16-1: three stages of 2 blocks, 16, 32 and 64 wide."""
    return _wrn(shape, classes, blocks=2, widen=1)


def wrn_16_2(shape: Shape, classes: int) -> nn.Module:
    """WRN-16-2: three stages of 2 blocks, 32, 64 and 128 wide."""
    return _wrn(shape, classes, blocks=2, widen=2)


def wrn_40_2(shape: Shape, classes: int) -> nn.Module:
    """WRN-40-2: three stages of 6 blocks, 32, 64 and 128 wide."""
    return _wrn(shape, classes, blocks=6, widen=2)


def _wrn(shape: Shape, classes: int, blocks: int, widen: int) -> nn.Module:
    widths = [16 * widen, 32 * widen, 64 * widen]
    layers: list[nn.Module] = [convolution(shape[0], 16, 3)]
    for inputs, outputs, stride in zip((16, *widths[:2]), widths, (1, 2, 2), strict=True):
        layers.append(stage(Wide, inputs, outputs, blocks, stride))
    layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)]
    network = averaging(layers, widths[-1], classes)
    he_normal(network)
    nn.init.zeros_(network.classifier.get_parameter("bias"))
    return network


class Wide(nn.Module):
    """branch(a) + shortcut, a = relu(norm(x)): x itself where the channels stay, else a 1x1 convolution of a."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.branch = nn.Sequential(
            convolution(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            convolution(outputs, outputs, 3),
        )
        self.project = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N,C,H,W) -> maps of the block's channels."""
        a = self.activate(x)
        maps: Tensor = self.branch(a) + (x if self.project is None else self.project(a))
        return maps
