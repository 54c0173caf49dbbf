"""ShuffleNetV2: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018."""

import torch
from torch import Tensor, nn

from .layers import Shape, averaging, normed


def shufflenetv2(shape: Shape, classes: int) -> nn.Module:
    """The ShuffleNetV2 of Ma et al., "Undistillable", ICLR 2021, for small images: a stem that keeps the image's size.

    The stem is not activated, and convolutions have biases, as in the official code.
    """
    layers = normed(shape[0], 24, 3, bias=True)
    inputs = 24
    for outputs, repeats in ((116, 3), (232, 7), (464, 3)):
        layers += [Halving(inputs, outputs), *(Keeping(outputs) for _ in range(repeats))]
        inputs = outputs
    layers += _pointwise(inputs, 1024)
    return averaging(layers, 1024, classes)


class Halving(nn.Module):
    """Two branches, each of half the outputs, both of which halve the image; their channels shuffled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.short = nn.Sequential(
            *normed(inputs, inputs, 3, stride=2, groups=inputs, bias=True),
            *_pointwise(inputs, outputs // 2),
        )
        self.long = _long(inputs, outputs // 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N,C,H,W) -> maps (N,outputs,H/2,W/2)."""
        return shuffled(self.short(x), self.long(x))


class Keeping(nn.Module):
    """One half of the channels stays, the other goes through the branch; both halves shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.long = _long(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N,C,H,W) -> maps (N,C,H,W)."""
        kept, changed = x.chunk(2, dim=1)
        return shuffled(kept, self.long(changed))


def shuffled(first: Tensor, second: Tensor) -> Tensor:
    """The channels of both (N,C,H,W) in turns (N,2C,H,W): those of the next block's halves come from both."""
    return torch.stack((first, second), dim=2).flatten(1, 2)


def _long(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        *_pointwise(inputs, inputs),
        *normed(inputs, inputs, 3, stride, groups=inputs, bias=True),
        *_pointwise(inputs, outputs),
    )


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [*normed(inputs, outputs, 1, bias=True), nn.ReLU(inplace=True)]
