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
    augmented batch (without gradient); a tuple of these gives a tuple. Losses get fp32 whatever the precision. The last
    epoch counts. A fit that was interrupted goes on from its last checkpoint, to the same numbers.
    Raises `Diverged` with the epoch when the loss is no longer finite, `KdbenchError` when there is nothing to train on.
    """
    if len(x) == 0:
        raise KdbenchError("there are no images to train on: under this threat model the player owns none")
    model.to(memory_format=torch.channels_last)
    work = _Work(model, _optimizer(model, ctx.recipe), loss, augmented(x, ctx.recipe, ctx.generator), target, ctx)
    for epoch in range(work.resume(), ctx.recipe.epochs):
        with seeded(draw_seed(ctx.generator), ctx.device):  # dropout draws from the global generator
            total = work.epoch(epoch, len(x))
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
    """One fit under way: what is trained, on what, and where it is kept when interrupted."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    images: Callable[[Tensor], Tensor]
    target: Target
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
        _lay_out(self.optimizer)
        return int(state["epochs"])

    def epoch(self, epoch: int, images: int) -> float:
        """One pass in random order; the mean loss. The host waits for the device once, at the end."""
        recipe = self.ctx.recipe
        self.model.train()
        batches = _batches(images, recipe.batch, self.ctx.generator)
        total = torch.zeros((), device=self.ctx.device)
        for step, index in enumerate(batches):
            _set_rate(self.optimizer, recipe, epoch + step / len(batches))
            total += self.step(self.images(index), index)
        return float(total) / len(batches)

    def step(self, x: Tensor, index: Tensor) -> Tensor:
        """One step on the batch `x`, the images at `index`; its loss."""
        with torch.autocast(self.ctx.device, torch.bfloat16, enabled=self.ctx.precision == "bf16"):
            target = _resolve(self.target, x, index)
            z = self.model(x)
        value = self.loss(z.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        if self.ctx.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.ctx.recipe.clip)
        self.optimizer.step()
        return value.detach()

    def finished(self, epoch: int, total: float) -> None:
        """Say how far the fit is, and keep it if it is time."""
        epochs = self.ctx.recipe.epochs
        self.ctx.log.progress((epoch + 1) / epochs, f"epoch {epoch + 1}/{epochs}, loss {total:.3g}")
        if self.ctx.log.due():
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epochs": epoch + 1}
            self.ctx.log.save(self.slot, state)


def _batches(images: int, batch: int, generator: torch.Generator) -> Sequence[Tensor]:
    order = torch.randperm(images, generator=generator, device=generator.device)
    batches: Sequence[Tensor] = order.split(batch)
    # Batch norm cannot normalise a batch of one image.
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


def augmented(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Index (M,) -> those of the images `x` (N,C,H,W), each in a random window after zero padding and maybe flipped.

    The padded images are laid out once, channels last, and a batch is a gather of their windows: nothing is copied twice.
    """
    pad, (height, width) = recipe.crop, x.shape[2:]
    padded = nn.functional.pad(x, (pad, pad, pad, pad)) if pad else x
    windows = padded.permute(0, 2, 3, 1).contiguous().unfold(1, height, 1).unfold(2, width, 1)

    def batch(index: Tensor) -> Tensor:
        corner = torch.zeros(2, len(index), dtype=torch.long, device=x.device)
        if pad:
            corner = torch.randint(2 * pad + 1, corner.shape, generator=generator, device=x.device)
        images = windows[index, corner[0], corner[1]]
        if recipe.flip:
            flipped = (torch.rand(len(index), generator=generator, device=x.device) < 0.5).nonzero().flatten()
            images[flipped] = images[flipped].flip(3)
        return images

    return batch


def _resolve(target: Target, images: Tensor, index: Tensor) -> Any:
    if isinstance(target, tuple):
        return tuple(_resolve(part, images, index) for part in target)
    if isinstance(target, Tensor):
        return target[index]
    with torch.no_grad():
        answer = target(images)
    return answer.float() if answer.is_floating_point() else answer


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


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimiser remembers of a weight the weight's layout: fused steps take the two for equal in memory."""
    for weight, memory in optimizer.state.items():
        for name, value in memory.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                memory[name] = torch.empty_like(weight).copy_(value)


def _set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate(recipe, epoch)


def rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at `epoch` (fractional within one)."""
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
    passed = sum(milestone <= epoch for milestone in recipe.milestones)
    return float(recipe.lr * recipe.gamma**passed)
