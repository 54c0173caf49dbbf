"""What the tests of fused training share: methods that fit one student, and runs of them alone and together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from helpers import blobs, context
from kdbench.api import Context, Loss, Split, fit
from kdbench.game.methods import EngineHooks
from kdbench.training.fused import FusedTraining

RTOL, ATOL = 1e-3, 1e-4  # of weights after some ten steps: sums in another order, grown on the way

Method = Callable[[Context], nn.Module]


def fitting(loss: Loss, target: Any, data: Split, model: str | None = None) -> Method:
    def run(ctx: Context) -> nn.Module:
        student = ctx.new_student(model)
        fit(student, loss, data.x, target, ctx)
        return student

    return run


def alone(methods: Sequence[tuple[Method, Context]]) -> list[nn.Module]:
    return [run(ctx) for run, ctx in methods]


def together(methods: Sequence[tuple[Method, Context]]) -> list[nn.Module]:
    """What each method makes; what one raises comes at the end."""
    fused = FusedTraining()
    made: dict[int, nn.Module] = {}
    raised: list[BaseException] = []

    def run(number: int, method: Method, ctx: Context) -> None:
        try:
            made[number] = method(replace(ctx, engine=EngineHooks(fused=fused)))
        except BaseException as error:
            raised.append(error)

    fused.run([lambda n=n, m=m, c=c: run(n, m, c) for n, (m, c) in enumerate(methods)])  # type: ignore[misc]
    if raised:
        raise raised[0]
    return [made[n] for n in range(len(methods))]


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=RTOL, atol=ATOL), f"{name}: {(one - other).abs().max()}"


def with_recipe(seed: int, **changes: Any) -> Context:
    return context(blobs().train, epochs=3, seed=seed).training(**changes)


RECIPES: list[dict[str, Any]] = [
    {},
    {"optimizer": "adam", "lr": 0.001},
    {"momentum": 0.0},
    {"nesterov": True, "schedule": "cosine"},
    {"crop": 1, "flip": True, "batch": 25},
]
