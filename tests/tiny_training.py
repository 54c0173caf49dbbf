"""What several test files need of training: a small network on tiny data, a network of one weight, comparisons of bits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Context, Split, fit

State = dict[str, Tensor]


def state(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def network(width: int = 24) -> nn.Module:
    """For blobs; with batch norm and dropout: buffers, and draws from the global generator, too."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hidden = [nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 3))


def trained(data: Split, ctx: Context) -> nn.Module:
    model = network()
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    return model


class Slope(nn.Module):
    """One weight, the logit of every image: with the loss z.mean() its gradient is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.weights: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.weights.append(self.weight.item())
        return self.weight.expand(len(x), 1)


def mean(z: Tensor, _: object) -> Tensor:
    return z.mean()


def plain(ctx: Context, **changes: Any) -> Context:
    """The context with SGD that adds nothing to the gradient."""
    return ctx.training(**{"momentum": 0.0, "weight_decay": 0.0, **changes})
