"""Training, and inference. Data are whole tensors on the device; nothing is loaded."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.game.methods import Context
from kdbench.training.bn_folding import folded
from kdbench.training.loop import Loss, QueryFunction, Target, TrainingLoop, autocast

CONSTANT = (nn.Conv1d, nn.Conv2d, nn.Linear)  # layers whose weights autocast would cast again at every query


def fit(model: nn.Module, loss: Loss, x: Tensor, target: Target, ctx: Context, name: str | None = None) -> None:
    """Train `model` in place by `ctx.recipe` on images `x` (N,C,H,W) in [0,1], and leave it in eval mode.

    target: what `loss(logits, target)` takes. A tensor (N,...) is cut to the batch; a function is called on each
    augmented batch (without gradient); a tuple of these gives a tuple. Losses get fp32 whatever the precision. The last
    epoch counts. A fit that was interrupted goes on from its last checkpoint, to the same numbers. name: of that
    checkpoint, for a fit which a resumed method leaves out when it is over; other fits are numbered in their order.
    Raises `Diverged` with the epoch when the loss is no longer finite, `KdbenchError` when there is nothing to train on.
    """
    if len(x) == 0:
        raise KdbenchError("there are no images to train on: in this scenario the attacker has none")
    loop = TrainingLoop(model, loss, x, target, ctx, name)
    if ctx.engine.fused:
        ctx.engine.fused(loop)
    loop.finish()


def predict_logits(model: nn.Module, x: Tensor, batch: int = 1024) -> Tensor:
    """Logits (N,K) of `model` in eval mode, without gradient."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(batch)])


def forward(model: Callable[[Tensor], Tensor], x: Tensor, ctx: Context) -> Tensor:
    """Logits (N,K) in fp32 of one forward pass with gradient, run in the precision of `ctx`."""
    with autocast(ctx):
        z = model(x)
    return z.float() if ctx.precision == "bf16" else z


def frozen_copy(model: nn.Module, ctx: Context) -> nn.Module:
    """A frozen copy of `model` in eval mode, for gradients in the images: its answers are the model's up to rounding."""
    images = ctx.data.x if len(ctx.data) else torch.zeros(1, *ctx.data.shape, device=ctx.device)
    return folded(model, images)


def inference(model: nn.Module, ctx: Context) -> QueryFunction:
    """The fastest form of `model` as it now is: images (N,C,H,W) -> logits (N,K) in fp32, without gradient.

    Its answers are the model's own in eval mode up to rounding, under bf16 to that of `ctx.precision`: a per cent or so
    of the largest logit. What is done to the model afterwards does not show.
    """
    form = frozen_copy(model, ctx)
    if ctx.precision == "bf16":
        for layer in form.modules():
            if isinstance(layer, CONSTANT):
                layer.to(torch.bfloat16)

    network = torch.compile(form, dynamic=False) if ctx.compile else form

    def ask(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(ctx):
            z: Tensor = network(x)
        return z.float() if ctx.precision == "bf16" else z

    return ask
