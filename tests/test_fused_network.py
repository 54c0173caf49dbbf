"""A fused network computes what its members do, or is not made."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers import playable
from kdbench import registry
from kdbench.training.fused_network import fuse

# Their layers mix channels of all members (concatenation, shuffling), or draw random numbers.
SOLO = {"shufflenetv2", "distillation-mnist", "distillation-cifar10"}


@pytest.mark.parametrize("name", playable("model"))
def test_each_network_is_fused_or_trained_alone(name: str) -> None:
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        members.append(registry.load("model", name)((3, 32, 32), 10))
    x = torch.rand(2, 3, 32, 32)
    before = [copy.deepcopy(member.state_dict()) for member in members]
    fused = fuse(members, x)
    assert (fused is None) == (name in SOLO)
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in member.state_dict().items())
    if fused:
        answers = fused(torch.cat([x, x], dim=1))
        for k, member in enumerate(members):
            expected = member(x)
            assert (answers[:, k] - expected).abs().max() <= 0.01 * expected.abs().max()  # in fp32


class Odd(nn.Module):
    """A layer with weights of an unknown kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(10, 10), nn.Linear(10, 10)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.other(self.one(x))
        return z


@pytest.mark.parametrize("layer", [Odd, Tied, lambda: nn.Dropout(0.5), lambda: nn.LayerNorm(10), lambda: nn.Softmax(1)])
def test_layers_that_would_compute_something_else_are_not_fused(layer: Callable[[], nn.Module]) -> None:
    members = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10), layer()) for _ in range(2)]
    assert fuse(members, torch.rand(16, 1, 8, 8)) is None
