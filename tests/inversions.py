"""DeepInversion in small, and what tests need to run it."""

from dataclasses import replace
from typing import Any

from torch import nn

from helpers import context, undefended
from kdbench.api import (
    Access,
    Attack,
    Context,
    Oracle,
    Scenario,
    Split,
)
from kdbench.attacks.deep_inversion import DeepInversion

EPOCHS = 2


SMALL = DeepInversion(images=60, batch=24, iterations=8, lr=0.2, jitter=1, queries="once")


ADAPTIVE = replace(SMALL, competition=10.0, steps=3)


def oracle_on(model: nn.Module, access: Access = Access.WEIGHTS, budget: int | None = None) -> Oracle:
    return Oracle(undefended(model), Scenario(access=access, budget=budget), model)


def attacker(attack: Attack, data: Split, seed: int = 0) -> Context:
    """The attacker's side, with the part of `data` that `attack` uses."""
    return context(attack.data_subset().of(data), EPOCHS, seed)


def name(attack: Attack) -> str:
    kind = "Adaptive" if getattr(attack, "competition", 0) else ""
    return f"{kind}{type(attack).__name__}-{getattr(attack, 'queries', '')}"


def norms(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def hooks(model: nn.Module) -> int:
    return sum(len(layer._forward_pre_hooks) + ("forward" in vars(layer)) for layer in model.modules())
