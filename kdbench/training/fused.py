"""Fused training: fits of one architecture run as a single network of grouped convolutions."""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from kdbench.game.roles import draw_seed
from kdbench.training.fused_network import FusedNetwork, fuse
from kdbench.training.loop import TrainingLoop, autocast, make_optimizer, set_rate

Problems = dict[TrainingLoop, BaseException]


class FusedTraining:
    """Runs several methods side by side and trains their networks together: each runs until it calls `fit`, and waits.

    Fits that wait at the same time, of one architecture, recipe and number of images, are trained as one fused group;
    all others by themselves. Every member draws its batches from its own generator and asks its own teacher, as it
    would alone. Its numbers are those of its solo run up to rounding, whoever else is in the group.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[greenlet, TrainingLoop]] = []
        self._waited: dict[greenlet, float] = {}

    def run(self, methods: Sequence[Callable[[], object]]) -> None:
        """Run all `methods`, in whose contexts this is `engine.fused`, to their end."""
        self._home = getcurrent()
        for method in methods:
            greenlet(method).switch()
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            problems = _train([loop for _, loop in waiting])
            for waiter, loop in waiting:
                waiter.switch(problems.get(loop))

    def __call__(self, loop: TrainingLoop) -> None:
        """Wait until `loop` is trained as far as a fused group can. Raises what ended it early."""
        method, start, trained = getcurrent(), time.perf_counter(), loop.seconds
        self._waiting.append((method, loop))
        problem: BaseException | None = self._home.switch()
        passed = time.perf_counter() - start
        self._waited[method] = self.waited() + passed - (loop.seconds - trained)
        if problem:
            raise problem

    def waited(self) -> float:
        """Seconds that the calling method has waited for others so far, without its share of training in groups."""
        return self._waited.get(getcurrent(), 0.0)


def _train(loops: Sequence[TrainingLoop]) -> Problems:
    """Train what can be fused; what ended some loops early. Loops that cannot be fused are left to their methods."""
    groups: dict[Hashable, list[TrainingLoop]] = {}
    for loop in loops:
        groups.setdefault(_fusible_group(loop), []).append(loop)
    problems: Problems = {}
    for members in groups.values():
        while group := FusedGroup.of([loop for loop in members if loop.left and loop not in problems]):
            problems |= group.train()
    return problems


def _fusible_group(loop: TrainingLoop) -> Hashable:
    """Equal for loops that may be fused: the same layers, recipe and steps."""
    shapes = tuple((name, value.shape) for name, value in loop.model.state_dict().items())
    return repr(loop.model), shapes, loop.x.shape, loop.done, loop.ctx.recipe, loop.ctx.device, loop.ctx.precision


class FusedGroup:
    """Training loops in lockstep, their networks as one."""

    def __init__(self, loops: Sequence[TrainingLoop], network: FusedNetwork) -> None:
        self._loops, self._network = loops, network
        self._recipe, self._ctx = loops[0].ctx.recipe, loops[0].ctx
        self._problems: Problems = {}
        self._optimizer = make_optimizer(network, self._recipe)
        network.gather(self._optimizer, [loop.optimizer for loop in loops])

    @classmethod
    def of(cls, loops: Sequence[TrainingLoop]) -> "FusedGroup | None":
        """The fused group of `loops` of one fusible group, or None where they must be trained one by one.

        That is so for fewer than two loops and where fused training computes something else: gradients are clipped by
        the norm of one network, layers mix channels or draw random numbers. Compiled networks are not fused either.
        """
        if len(loops) < 2 or loops[0].ctx.recipe.clip or loops[0].ctx.compile:
            return None
        network = fuse([loop.model for loop in loops], loops[0].x)
        return cls(loops, network) if network else None

    def train(self) -> Problems:
        """Train to the end, or to the end of an epoch in which a loop has ended early; what ended it."""
        while self._loops[0].left and not self._problems:
            start = self._loops[0].now()
            losses = self._epoch()
            self._scatter()
            seconds = (self._loops[0].now() - start) / len(self._loops)
            for loop, loss in zip(self._loops, losses, strict=True):
                if loop not in self._problems:
                    self._end_epoch(loop, loss, seconds)
        return self._problems

    def _end_epoch(self, loop: TrainingLoop, loss: float, seconds: float) -> None:
        try:
            loop.end_epoch(loss, seconds)
        except BaseException as problem:  # raised in its method; the other loops go on
            self._problems[loop] = problem

    def _scatter(self) -> None:
        """Write weights and optimizer state back to all loops but those that ended before."""
        current = [k for k, loop in enumerate(self._loops) if loop not in self._problems]
        self._network.scatter(self._optimizer, [loop.optimizer for loop in self._loops], current)

    def _epoch(self) -> list[float]:
        """One epoch; the mean loss of each loop."""
        for loop in self._loops:
            draw_seed(loop.ctx.generator)  # a solo run draws it for dropout
        epochs = [loop.batches() for loop in self._loops]
        self._network.train()
        total = torch.zeros(len(self._loops), device=self._ctx.device)
        for step, index in enumerate(zip(*epochs, strict=True)):
            set_rate(self._optimizer, self._recipe, self._loops[0].done + step / len(epochs[0]))
            total += self._step(index)
        means: list[float] = (total / len(epochs[0])).tolist()
        return means

    def _step(self, index: Sequence[Tensor]) -> Tensor:
        """One step of all K loops, each on its images at its `index` (M,); their losses (K,)."""
        loops = self._loops
        batches = [self._attempt(loop, loop.images, i) for loop, i in zip(loops, index, strict=True)]
        targets = [self._attempt(loop, loop.targets, x, i) for loop, x, i in zip(loops, batches, index, strict=True)]
        blank = loops[0].x[: len(index[0])]
        with autocast(self._ctx):
            z = self._network(torch.cat([blank if x is None else x for x in batches], dim=1)).float()
        values = [
            self._attempt(loop, loop.loss, z_k, t) for loop, z_k, t in zip(loops, z.unbind(1), targets, strict=True)
        ]
        losses = torch.stack([z.new_zeros(()) if value is None else value for value in values])
        self._optimizer.zero_grad(set_to_none=True)
        if losses.requires_grad:
            losses.sum().backward()
            self._optimizer.step()
        return losses.detach()

    def _attempt(self, loop: TrainingLoop, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a loop's own function; None once one has failed, and the loop takes no further part."""
        if loop in self._problems:
            return None
        try:
            return function(*arguments)
        except Exception as problem:
            self._scatter()  # its method may go on with what its student has learnt so far
            self._problems[loop] = problem
            return None
