"""Many students at once: fits of one architecture run as a single network of grouped convolutions."""

import copy
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from kdbench.game.roles import draw_seed, seeded
from kdbench.training.loop import TrainingLoop, autocast, make_optimizer, set_rate

TRIED = 8  # images on which a stack has to answer as its members do
ROUNDING = 1e-9  # in double precision, as a share of the largest answer

Problems = dict[TrainingLoop, BaseException]


class FusedTraining:
    """Players that run side by side and train together: each plays until it has something to fit, and waits there.

    Fits that wait at the same time, of one architecture, recipe and number of images, are trained as one stack; all
    others by themselves. Every member draws its batches from its own generator and asks its own teacher, as it would
    alone, so that its numbers are those of its solo run up to rounding, whoever else is in the stack.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[greenlet, TrainingLoop]] = []
        self._idle: dict[greenlet, float] = {}

    def play(self, players: Sequence[Callable[[], object]]) -> None:
        """Run all `players`, in whose contexts this is the company, to their end."""
        self._home = getcurrent()
        for player in players:
            greenlet(player).switch()
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            problems = _train([loop for _, loop in waiting])
            for waiter, loop in waiting:
                waiter.switch(problems.get(loop))

    def __call__(self, loop: TrainingLoop) -> None:
        """Wait until `loop` is trained as far as others go along. Raises what ended it."""
        player, start, worked = getcurrent(), time.perf_counter(), loop.seconds
        self._waiting.append((player, loop))
        problem: BaseException | None = self._home.switch()
        passed = time.perf_counter() - start
        self._idle[player] = self.idle() + passed - (loop.seconds - worked)
        if problem:
            raise problem

    def idle(self) -> float:
        """Seconds for which the player that asks has so far waited for others, its share of common training left out."""
        return self._idle.get(getcurrent(), 0.0)


def _train(loops: Sequence[TrainingLoop]) -> Problems:
    """Train in stacks what can be; what ended some of them early. The others are left to their players."""
    fusible_group: dict[Hashable, list[TrainingLoop]] = {}
    for loop in loops:
        fusible_group.setdefault(_fusible_group(loop), []).append(loop)
    problems: Problems = {}
    for group in fusible_group.values():
        while stack := FusedGroup.of([loop for loop in group if loop.left and loop not in problems]):
            problems |= stack.train()
    return problems


def _fusible_group(loop: TrainingLoop) -> Hashable:
    """Equal for works that may share a stack: the same layers, recipe and steps."""
    shapes = tuple((name, value.shape) for name, value in loop.model.state_dict().items())
    return repr(loop.model), shapes, loop.x.shape, loop.done, loop.ctx.recipe, loop.ctx.device, loop.ctx.precision


class FusedGroup:
    """Works in lockstep, their networks as one."""

    def __init__(self, loops: Sequence[TrainingLoop], network: "FusedNetwork") -> None:
        self._loops, self._network = loops, network
        self._recipe, self._ctx = loops[0].ctx.recipe, loops[0].ctx
        self._problems: Problems = {}
        self._optimizer = make_optimizer(network, self._recipe)
        network.remember(self._optimizer, [loop.optimizer for loop in loops])

    @classmethod
    def of(cls, loops: Sequence[TrainingLoop]) -> "FusedGroup | None":
        """A stack of kin; None where there is nothing to stack, or where alone is not the same: gradients are clipped
        (by the norm of one network), layers mix channels or draw random numbers."""
        if len(loops) < 2 or loops[0].ctx.recipe.clip or loops[0].ctx.compile:
            return None
        network = fused_network([loop.model for loop in loops], loops[0].x[:TRIED])
        return cls(loops, network) if network else None

    def train(self) -> Problems:
        """Train to the end, or to the end of an epoch in which one of the works has ended early; what ended it."""
        while self._loops[0].left and not self._problems:
            start = self._loops[0].now()
            losses = self._epoch()
            self._spread()
            seconds = (self._loops[0].now() - start) / len(self._loops)
            for loop, loss in zip(self._loops, losses, strict=True):
                if loop not in self._problems:
                    self._end(loop, loss, seconds)
        return self._problems

    def _end(self, loop: TrainingLoop, loss: float, seconds: float) -> None:
        try:
            loop.ended(loss, seconds)
        except BaseException as problem:  # its player's to hear of; the others go on
            self._problems[loop] = problem

    def _spread(self) -> None:
        """Bring all works up to date but those that ended before."""
        current = [k for k, loop in enumerate(self._loops) if loop not in self._problems]
        self._network.spread(self._optimizer, [loop.optimizer for loop in self._loops], current)

    def _epoch(self) -> list[float]:
        """One epoch; the mean loss of each."""
        for loop in self._loops:
            draw_seed(loop.ctx.generator)  # as alone, where it is dropout's
        epochs = [loop.batches() for loop in self._loops]
        self._network.train()
        total = torch.zeros(len(self._loops), device=self._ctx.device)
        for step, index in enumerate(zip(*epochs, strict=True)):
            set_rate(self._optimizer, self._recipe, self._loops[0].done + step / len(epochs[0]))
            total += self._step(index)
        means: list[float] = (total / len(epochs[0])).tolist()
        return means

    def _step(self, index: Sequence[Tensor]) -> Tensor:
        """One step on the images of each at its `index`; their losses (K,)."""
        batches = [self._own(loop, loop.images, i) for loop, i in zip(self._loops, index, strict=True)]
        targets = [self._own(loop, loop.answers, x, i) for loop, x, i in zip(self._loops, batches, index, strict=True)]
        blank = self._loops[0].x[: len(index[0])]
        with autocast(self._ctx):
            z = self._network(torch.cat([blank if x is None else x for x in batches], dim=1)).float()
        own = [
            self._own(loop, loop.loss, z_k, t) for loop, z_k, t in zip(self._loops, z.unbind(1), targets, strict=True)
        ]
        losses = torch.stack([z.new_zeros(()) if value is None else value for value in own])
        self._optimizer.zero_grad(set_to_none=True)
        if losses.requires_grad:
            losses.sum().backward()
            self._optimizer.step()
        return losses.detach()

    def _own(self, loop: TrainingLoop, do: Callable[..., Any], *given: Any) -> Any:
        """What a work does by itself; None once that has failed: its place in the stack then stays empty."""
        if loop in self._problems:
            return None
        try:
            return do(*given)
        except Exception as problem:
            self._spread()  # a player may make do with what its student has learnt so far
            self._problems[loop] = problem
            return None


def fused_network(members: Sequence[nn.Module], x: Tensor) -> "FusedNetwork | None":
    """The stack of networks of one architecture; None unless it has given their answers, in train mode, on images `x`.

    Convolutions become grouped, batch norms wider, linear layers a batch of products. What has no weights is kept: if
    it mixes channels (concatenation, shuffling) or draws random numbers, the answers tell.
    """
    try:
        stack = FusedNetwork(members)
        answers = _answers(stack, x.repeat(1, len(members), 1, 1)).unbind(1)
    except (_Unstackable, RuntimeError, TypeError):  # shapes that do not fit, or a device without double precision
        return None
    expected = [_answers(member, x) for member in members]
    alike = all(_close(ours, theirs) for ours, theirs in zip(answers, expected, strict=True))
    return stack if alike else None


def _answers(network: nn.Module, x: Tensor) -> Tensor:
    tensors = {name: _double(value) for name, value in network.state_dict().items()}  # copies: the statistics move
    with torch.no_grad(), seeded(0, str(x.device)):
        answers: Tensor = functional_call(network.train(), tensors, (x.double(),))
    return answers


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.clone()


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= ROUNDING * theirs.abs().max())


class _Unstackable(Exception):
    """A layer with weights is of an unknown kind, or weights are shared."""


class FusedNetwork(nn.Module):
    """Networks of one architecture side by side: images (N,K C,H,W) -> logits (N,K,classes).

    Each of its tensors is those of the members one after another, along a dimension. Raises `_Unstackable`.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self._members = list(members)  # in a list, so that they are no layers of this
        self._along: dict[str, int] = {}
        self.network = copy.deepcopy(members[0])
        names = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        if len(names) > len(list(self.network.parameters())):
            raise _Unstackable
        for name, layer in list(self.network.named_modules()):
            self._widen(name, layer)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,K C,H,W) -> logits (N,K,classes)."""
        z: Tensor = self.network(x)
        return z.view(len(x), len(self._members), -1)

    def remember(self, optimizer: Optimizer, theirs: Sequence[Optimizer]) -> None:
        """Take over what the members' optimisers remember of their weights."""
        for weight, along, own in self._weights():
            memories = [other.state[mine] for other, mine in zip(theirs, own, strict=True) if mine in other.state]
            for name, value in memories[0].items() if memories else ():
                optimizer.state[weight][name] = copy.deepcopy(value)
                if _is_of(value, own[0]):
                    values = torch.cat([memory[name] for memory in memories], along)
                    optimizer.state[weight][name] = torch.empty_like(weight).copy_(values)

    def spread(self, optimizer: Optimizer, theirs: Sequence[Optimizer], whom: Sequence[int]) -> None:
        """Give each member of `whom` what is its own: weights, statistics, and what its optimiser would remember."""
        states = [member.state_dict() for member in self._members]
        for name, value in self.network.state_dict().items():
            parts = self._parts(value, self._along.get(name))
            for k in whom:
                states[k][name].copy_(parts[k])
        for weight, along, weights in self._weights():
            for name, value in optimizer.state[weight].items():
                parts = self._parts(value, along if _is_of(value, weight) else None)
                for k in whom:
                    mine, part = weights[k], parts[k]
                    kept = torch.empty_like(mine).copy_(part) if _is_of(part, mine) else copy.deepcopy(part)
                    theirs[k].state[mine][name] = kept

    def _weights(self) -> Iterator[tuple[nn.Parameter, int, list[nn.Parameter]]]:
        """Each weight, along which dimension it is the members', and theirs."""
        for name, weight in self.network.named_parameters():
            yield weight, self._along[name], [member.get_parameter(name) for member in self._members]

    def _parts(self, value: Any, along: int | None) -> Sequence[Any]:
        count = len(self._members)
        return [value] * count if along is None else value.chunk(count, along)

    def _widen(self, name: str, layer: nn.Module) -> None:
        """Put the members' tensors of one layer together."""
        layers = [member.get_submodule(name) for member in self._members]
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        own = {key: value for key, value in own.items() if value.ndim}  # a count of batches is the same in all
        if not own:
            return
        wide, along = _wide(layer, own, len(layers))
        for key, value in own.items():
            values = torch.cat([getattr(other, key).detach() for other in layers], along)
            setattr(wide, key, nn.Parameter(values) if isinstance(value, nn.Parameter) else values)
            self._along[f"{name}.{key}"] = along
        if wide is not layer:
            parent, _, last = name.rpartition(".")
            setattr(self.network.get_submodule(parent), last, wide)


def _wide(layer: nn.Module, own: Mapping[str, Tensor], count: int) -> tuple[nn.Module, int]:
    """A layer that does the work of `count` such, and along which dimension their tensors `own` lie in its."""
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
    if all(value.ndim == 4 and value.shape[0] == value.shape[2:].numel() == 1 for value in own.values()):
        return layer, 1  # one number a channel, as for standardising images
    raise _Unstackable


class _Linears(nn.Module):
    """`count` linear layers on a part each of the features (N,count F)."""

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


def _is_of(value: object, weight: Tensor) -> bool:
    """Whether an optimiser's memory is one number for each of a weight, and not of the weight as a whole."""
    return isinstance(value, Tensor) and value.shape == weight.shape
