"""Networks of one architecture as a single network of grouped convolutions, and the way back to each of them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from kdbench.game.roles import seeded

COMPARED = 8  # images on which a fused network has to give the answers of its members
ROUNDING = 1e-9  # in double precision, as a share of the largest answer


def fuse(members: Sequence[nn.Module], x: Tensor) -> "FusedNetwork | None":
    """The fused network of `members`, all of one architecture, or None where it would not compute what they do.

    x: images (N,C,H,W), on the first of which it has given the members' answers in train mode. Convolutions become
    grouped, batch norms wider, linear layers a batch of products. Layers without weights are kept. Some mix channels
    (concatenation, shuffling) or draw random numbers: then the answers differ.
    """
    x = x[:COMPARED]
    try:
        network = FusedNetwork(members)
        answers = _answers(network, x.repeat(1, len(members), 1, 1)).unbind(1)
    except (NotFusible, RuntimeError, TypeError):  # shapes that do not fit, or a device without double precision
        return None
    expected = [_answers(member, x) for member in members]
    equal = all(_close(ours, theirs) for ours, theirs in zip(answers, expected, strict=True))
    return network if equal else None


def _answers(network: nn.Module, x: Tensor) -> Tensor:
    tensors = {name: _double(value) for name, value in network.state_dict().items()}  # copies: the statistics move
    with torch.no_grad(), seeded(0, str(x.device)):
        answers: Tensor = functional_call(network.train(), tensors, (x.double(),))
    return answers


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.clone()


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= ROUNDING * theirs.abs().max())


class NotFusible(Exception):
    """A layer with weights is of an unknown kind, or layers share weights."""


class FusedNetwork(nn.Module):
    """Networks of one architecture side by side: images (N,K C,H,W) -> logits (N,K,classes), for K members.

    Each of its tensors consists of those of the members, one after another along a dimension. Raises `NotFusible`.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self._members = list(members)  # in a list, so that they are not submodules
        self._along: dict[str, int] = {}
        self.network = copy.deepcopy(members[0])
        names = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        if len(names) > len(list(self.network.parameters())):
            raise NotFusible
        for name, layer in list(self.network.named_modules()):
            self._fuse_layer(name, layer)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,K C,H,W) -> logits (N,K,classes)."""
        z: Tensor = self.network(x)
        return z.view(len(x), len(self._members), -1)

    def gather(self, optimizer: Optimizer, optimizers: Sequence[Optimizer]) -> None:
        """Put the state of the members' `optimizers` (momentum, say) into that of the fused network, `optimizer`."""
        for weight, along, weights in self._weights():
            states = [other.state[own] for other, own in zip(optimizers, weights, strict=True) if own in other.state]
            for name, value in states[0].items() if states else ():
                optimizer.state[weight][name] = copy.deepcopy(value)
                if _is_elementwise(value, weights[0]):
                    values = torch.cat([state[name] for state in states], along)
                    optimizer.state[weight][name] = torch.empty_like(weight).copy_(values)

    def scatter(self, optimizer: Optimizer, optimizers: Sequence[Optimizer], members: Sequence[int]) -> None:
        """Write weights, statistics and the state of the optimizer back to the members with these indices."""
        states = [member.state_dict() for member in self._members]
        for name, value in self.network.state_dict().items():
            parts = self._parts(value, self._along.get(name))
            for k in members:
                states[k][name].copy_(parts[k])
        for weight, along, weights in self._weights():
            for name, value in optimizer.state[weight].items():
                parts = self._parts(value, along if _is_elementwise(value, weight) else None)
                for k in members:
                    own, part = weights[k], parts[k]
                    kept = torch.empty_like(own).copy_(part) if _is_elementwise(part, own) else copy.deepcopy(part)
                    optimizers[k].state[own][name] = kept

    def _weights(self) -> Iterator[tuple[nn.Parameter, int, list[nn.Parameter]]]:
        """Each weight, the dimension along which the members' are concatenated, and theirs."""
        for name, weight in self.network.named_parameters():
            yield weight, self._along[name], [member.get_parameter(name) for member in self._members]

    def _parts(self, value: Any, along: int | None) -> Sequence[Any]:
        count = len(self._members)
        return [value] * count if along is None else value.chunk(count, along)

    def _fuse_layer(self, name: str, layer: nn.Module) -> None:
        """Concatenate the members' tensors of one layer."""
        layers = [member.get_submodule(name) for member in self._members]
        tensors = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        tensors = {key: value for key, value in tensors.items() if value.ndim}  # a count of batches is the same in all
        if not tensors:
            return
        fused, along = _fused_layer(layer, tensors, len(layers))
        for key, value in tensors.items():
            values = torch.cat([getattr(other, key).detach() for other in layers], along)
            setattr(fused, key, nn.Parameter(values) if isinstance(value, nn.Parameter) else values)
            self._along[f"{name}.{key}"] = along
        if fused is not layer:
            parent, _, last = name.rpartition(".")
            setattr(self.network.get_submodule(parent), last, fused)


def _fused_layer(layer: nn.Module, tensors: Mapping[str, Tensor], count: int) -> tuple[nn.Module, int]:
    """A layer that computes what `count` such do, and the dimension along which their `tensors` are concatenated."""
    if type(layer) is nn.Conv2d:
        layer.groups, layer.in_channels, layer.out_channels = (
            count * n for n in (layer.groups, layer.in_channels, layer.out_channels)
        )
        return layer, 0
    if type(layer) is nn.BatchNorm1d or type(layer) is nn.BatchNorm2d:
        layer.num_features *= count
        return layer, 0
    if type(layer) is nn.Linear:
        return _Linears(count), 0
    if all(value.ndim == 4 and value.shape[0] == value.shape[2:].numel() == 1 for value in tensors.values()):
        return layer, 1  # one number a channel, as for standardising images
    raise NotFusible


class _Linears(nn.Module):
    """`count` linear layers, each on its own part of the features (N,count F)."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N,count F) -> (N,count G)."""
        weight = self.weight.unflatten(0, (self._count, -1))
        z = torch.bmm(x.view(len(x), self._count, -1).transpose(0, 1), weight.transpose(1, 2))
        z = z.transpose(0, 1).reshape(len(x), -1)
        return z if self.bias is None else z + self.bias


def _is_elementwise(value: object, weight: Tensor) -> bool:
    """Whether an optimizer keeps one number for each element of `weight`, not one for the weight as a whole."""
    return isinstance(value, Tensor) and value.shape == weight.shape
