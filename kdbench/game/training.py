"""The one training loop, and its twin for answers. Data are whole tensors on the device; nothing is loaded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.errors import Diverged, KdbenchError
from kdbench.game.methods import Context, Recipe, draw_seed, seeded

Ask = Callable[[Tensor], Tensor]
Part = Tensor | Ask
Target = Part | tuple[Part, ...]
Loss = Callable[[Tensor, Any], Tensor]


def fit(model: nn.Module, loss: Loss, x: Tensor, target: Target, ctx: Context) -> None:
    """Train `model` in place by `ctx.recipe` on images `x` (N,C,H,W) in [0,1], and leave it in eval mode.

    target: what `loss(logits, target)` takes. A tensor (N,...) is cut to the batch; a callable is asked on each
    augmented batch (without gradient); a tuple of these gives a tuple. The last epoch counts. A fit that was
    interrupted goes on from its last checkpoint, to the same numbers.
    Raises `Diverged` with the epoch when the loss is no longer finite, `KdbenchError` when there is nothing to train on.
    """
    if len(x) == 0:
        raise KdbenchError("there are no images to train on: under this threat model the player owns none")
    work = _Work(model, _optimizer(model, ctx.recipe), ctx)
    for epoch in range(work.resume(), ctx.recipe.epochs):
        with seeded(draw_seed(ctx.generator), ctx.device):  # dropout draws from the global generator
            total = _epoch(work, loss, x, target, epoch)
        if not math.isfinite(total):
            raise Diverged(epoch)
        work.finished(epoch, total)
    work.optimizer.zero_grad(set_to_none=True)  # gradients are a second copy of the weights
    model.eval()


def infer(model: nn.Module, x: Tensor, batch: int = 1024) -> Tensor:
    """Logits (N,K) of `model` in eval mode, without gradient."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(batch)])


@dataclass
class _Work:
    """One fit under way: what is trained, and where it is kept when interrupted."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ctx: Context

    def __post_init__(self) -> None:
        self.slot = self.ctx.log.slot()

    def resume(self) -> int:
        """Put back what an interrupted run kept; the epoch to go on with."""
        state = self.ctx.log.load(self.slot)
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["epochs"])

    def finished(self, epoch: int, total: float) -> None:
        epochs = self.ctx.recipe.epochs
        self.ctx.log.progress((epoch + 1) / epochs, f"epoch {epoch + 1}/{epochs}, loss {total:.3g}")
        if self.ctx.log.due():
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epochs": epoch + 1}
            self.ctx.log.save(self.slot, state)


def _epoch(work: _Work, loss: Loss, x: Tensor, target: Target, epoch: int) -> float:
    """One pass in random order; the mean loss. The host waits for the device once, at the end."""
    recipe, generator = work.ctx.recipe, work.ctx.generator
    work.model.train()
    batches = _batches(len(x), recipe.batch, generator)
    total = torch.zeros((), device=x.device)
    for step, index in enumerate(batches):
        _set_rate(work.optimizer, recipe, epoch + step / len(batches))
        images = augment(x[index], recipe, generator)
        value = loss(work.model(images), _resolve(target, images, index))
        work.optimizer.zero_grad(set_to_none=True)
        value.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(work.model.parameters(), recipe.clip)
        work.optimizer.step()
        total += value.detach()
    return float(total) / len(batches)


def _batches(images: int, batch: int, generator: torch.Generator) -> Sequence[Tensor]:
    order = torch.randperm(images, generator=generator, device=generator.device)
    batches: Sequence[Tensor] = order.split(batch)
    # Batch norm cannot normalise a batch of one image.
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


def augment(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Random crops after zero padding, and random flips, one draw an image; x (N,C,H,W)."""
    if recipe.crop:
        x = _crop(x, recipe.crop, generator)
    if recipe.flip:
        flipped = torch.rand(len(x), generator=generator, device=x.device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    return x


def _crop(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = x.shape
    windows = nn.functional.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    corner = torch.randint(2 * pad + 1, (2, count), generator=generator, device=x.device)
    return windows[torch.arange(count, device=x.device), :, corner[0], corner[1]]


def _resolve(target: Target, images: Tensor, index: Tensor) -> Any:
    if isinstance(target, tuple):
        return tuple(_resolve(part, images, index) for part in target)
    if isinstance(target, Tensor):
        return target[index]
    with torch.no_grad():
        return target(images)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
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


def _set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, epoch)


def rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at `epoch` (fractional within one)."""
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
    passed = sum(milestone <= epoch for milestone in recipe.milestones)
    return float(recipe.lr * recipe.gamma**passed)
