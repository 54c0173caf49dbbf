"""Blocks of residual networks: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016."""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import normed


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N,C,H,W) -> maps of the block's channels, none negative."""
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


def basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions."""
    branch = nn.Sequential(
        *normed(inputs, outputs, 3, stride),
        nn.ReLU(inplace=True),
        *normed(outputs, outputs, 3),
    )
    return Residual(branch, projection(inputs, outputs, stride))


def bottleneck(inputs: int, outputs: int, stride: int) -> nn.Module:
    """1x1 down to a quarter of the channels, 3x3 there, 1x1 up again."""
    return squeezed(inputs, outputs, stride, outputs // 4)


def squeezed(inputs: int, outputs: int, stride: int, inner: int, groups: int = 1) -> nn.Module:
    """1x1 to `inner` channels, 3x3 there in `groups`, 1x1 to `outputs`."""
    branch = nn.Sequential(
        *normed(inputs, inner, 1),
        nn.ReLU(inplace=True),
        *normed(inner, inner, 3, stride, groups),
        nn.ReLU(inplace=True),
        *normed(inner, outputs, 1),
    )
    return Residual(branch, projection(inputs, outputs, stride))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The shortcut: nothing where the maps keep their shape, else a 1x1 convolution with batch norm."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(*normed(inputs, outputs, 1, stride))
