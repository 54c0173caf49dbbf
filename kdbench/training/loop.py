"""The training loop behind `fit`: batches, optimizer, learning rate, checkpoints, throughput."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.errors import Diverged
from kdbench.game.methods import Context, Recipe
from kdbench.game.roles import draw_seed, seeded
from kdbench.training.augmentation import augmented

QueryFunction = Callable[[Tensor], Tensor]
"""Images (N,C,H,W) in [0,1] -> logits or log-probabilities (N,K)."""

SingleTarget = Tensor | QueryFunction
Target = SingleTarget | tuple[SingleTarget, ...]
"""What a loss compares logits with: a tensor (N,...) of all images, or a function of the batch, or a tuple of these."""

Loss = Callable[[Tensor, Any], Tensor]
"""Logits (M,K) in fp32 and the batch's target -> a scalar."""

WARM_STEPS, BARE_STEPS = 3, 20  # of a bare loop: not timed, and timed


class TrainingLoop:
    """A network in training, its data and its progress. It starts from the checkpoint of an interrupted run, if there is one."""

    def __init__(
        self, model: nn.Module, loss: Loss, x: Tensor, target: Target, ctx: Context, name: str | None = None
    ) -> None:
        self.model, self.loss, self.x, self.ctx = model.to(memory_format=torch.channels_last), loss, x, ctx
        self._network: Any = torch.compile(model, dynamic=False) if ctx.compile else model
        self.optimizer = make_optimizer(model, ctx.recipe)
        self.images = augmented(x, ctx.recipe, ctx.generator)
        self.done = 0
        self._target = target
        self._checkpoint = ctx.checkpoint(name or ctx.log.next_fit())
        self.seconds = 0.0
        self._trained, self._querying = 0, 0.0
        self._last: tuple[Tensor, Any] = (x[:0], None)
        self._resume()

    @property
    def left(self) -> int:
        """Epochs still to do."""
        return self.ctx.recipe.epochs - self.done

    def finish(self) -> None:
        """Train the epochs that are left, and leave the network in eval mode."""
        while self.left:
            start = self.now()
            loss = self.epoch()
            self.end_epoch(loss, self.now() - start)
        self.ctx.log.timed(self._trained, self.seconds, self._bare_throughput() if self.ctx.log.profiling else None)
        self.optimizer.zero_grad(set_to_none=True)  # gradients are a second copy of the weights
        self.model.eval()

    def epoch(self) -> float:
        """One pass in random order; the mean loss. The host waits for the device once, at the end."""
        self.model.train()
        with seeded(draw_seed(self.ctx.generator), self.ctx.device):  # dropout draws from the global generator
            batches = self.batches()
            total = torch.zeros((), device=self.ctx.device)
            for step, index in enumerate(batches):
                set_rate(self.optimizer, self.ctx.recipe, self.done + step / len(batches))
                x = self.images(index)
                total += self._step(x, self.targets(x, index))
        return float(total) / len(batches)

    def batches(self) -> Sequence[Tensor]:
        """The images of one epoch by index, in random order."""
        generator = self.ctx.generator
        order = torch.randperm(len(self.x), generator=generator, device=generator.device)
        batches: Sequence[Tensor] = order.split(self.ctx.recipe.batch)
        # Batch norm cannot normalise a batch of one image.
        return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches

    def targets(self, x: Tensor, index: Tensor) -> Any:
        """The target of a batch `x` (M,C,H,W), the augmented images at `index` (M,)."""
        start = self.now()
        with autocast(self.ctx):
            target = _of_batch(self._target, x, index)
        self._querying += self.now() - start
        if len(x) >= len(self._last[0]):  # the last batch of an epoch may be too small to tell anything
            self._last = x, target
        return target

    def end_epoch(self, loss: float, seconds: float) -> None:
        """Count an epoch that took `seconds`, report progress, and save a checkpoint if one is due.

        Raises `Diverged` when the mean `loss` is not finite.
        """
        if not math.isfinite(loss):
            raise Diverged(self.done)
        self.done += 1
        self._trained += len(self.x)
        self.seconds += seconds
        epochs, log = self.ctx.recipe.epochs, self.ctx.log
        log.progress(self.done / epochs, f"epoch {self.done}/{epochs}, loss {loss:.3g}")
        if self._checkpoint.due():
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epochs": self.done}
            self._checkpoint.save(state)

    def now(self) -> float:
        """The time in seconds; when throughput is measured, after all work queued on an accelerator."""
        if self.ctx.log.profiling and self.ctx.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _step(self, x: Tensor, target: Any) -> Tensor:
        return _step(self._network, self.optimizer, self.loss, x, target, self.ctx)

    def _bare_throughput(self) -> float | None:
        """Images/s of a bare loop: the queries at the time they took, and steps of a copy on the last batch."""
        if not self._trained:
            return None
        state = self.ctx.generator.get_state()
        network = copy.deepcopy(self.model).train()
        step = partial(_step, network, make_optimizer(network, self.ctx.recipe), self.loss, *self._last, self.ctx)
        with seeded(0, self.ctx.device):
            for _ in range(WARM_STEPS):
                step()
            start = self.now()
            for _ in range(BARE_STEPS):
                step()
            seconds = (self.now() - start) / BARE_STEPS
        self.ctx.generator.set_state(state)  # a loss may have drawn from it
        return self._trained / (self._querying + seconds * self._trained / len(self._last[0]))

    def _resume(self) -> None:
        state = self._checkpoint.load()
        if state is None:
            return
        restore(self.model, state["model"])
        restore(self.optimizer, state["optimizer"])
        self.done = int(state["epochs"])


def autocast(ctx: Context) -> AbstractContextManager[object]:
    """Autocast context for forward passes under bf16; does nothing in fp32."""
    return torch.autocast(ctx.device, torch.bfloat16) if ctx.precision == "bf16" else nullcontext()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe, for the parameters of `model`."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        model.parameters(),
        recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    """Set the learning rate for `epoch` (fractional within one)."""
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, epoch)


def rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at `epoch` (fractional within one)."""
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
    passed = sum(milestone <= epoch for milestone in recipe.milestones)
    return float(recipe.lr * recipe.gamma**passed)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, x: Tensor, target: Any, ctx: Context
) -> Tensor:
    with autocast(ctx):
        z = model(x)
    value = loss(z.float(), target)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    if ctx.recipe.clip:
        nn.utils.clip_grad_norm_(model.parameters(), ctx.recipe.clip)
    optimizer.step()
    return value.detach()


def _of_batch(target: Target, images: Tensor, index: Tensor) -> Any:
    if isinstance(target, tuple):
        return tuple(_of_batch(part, images, index) for part in target)
    if isinstance(target, Tensor):
        return target[index]
    with torch.no_grad():
        answer = target(images)
    return answer.float() if answer.is_floating_point() else answer


def restore(part: nn.Module | torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict, as a checkpoint kept it, into a network or an optimizer."""
    part.load_state_dict(state)  # type: ignore[arg-type]  # an optimizer declares dict
    if isinstance(part, torch.optim.Optimizer):
        match_memory_format(part)


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give the state that an optimizer keeps for a weight the weight's memory format, which fused steps assume."""
    for weight, memory in optimizer.state.items():
        for name, value in memory.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                memory[name] = torch.empty_like(weight).copy_(value)
