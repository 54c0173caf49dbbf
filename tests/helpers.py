"""What several test files need: a context on tiny data."""

import itertools
from pathlib import Path

import torch
from torch import nn

from kdbench import registry
from kdbench.api import Context, Images, Log, Recipe, Split, seeded
from kdbench.game.methods import EngineHooks
from kdbench.game.roles import Role, derive
from kdbench.training.fit import inference
from kdbench.zoo.datasets import Blobs


def playable(kind: str) -> list[str]:
    """The registered names that stand for something without an argument."""
    return [entry.name for entry in registry.entries(kind) if not isinstance(entry.load(), registry.Parametrised)]


def blobs() -> Images:
    """Three classes of 1x8x8 images, 96 a split."""
    return Blobs().load(Path())


def context(data: Split, epochs: int = 2, seed: int = 0, model: str = "mini-8") -> Context:
    """A context of somebody who has `data` and trains `model` for `epochs` on the CPU; two with equal arguments do the same."""
    calls = itertools.count()

    def new_student(name: str | None = None) -> nn.Module:
        with seeded(derive(seed, Role.STUDENT_WEIGHTS, next(calls))):
            network: nn.Module = registry.load("model", name or model)(data.shape, data.classes)
            return network.to(memory_format=torch.channels_last)

    recipe = Recipe(epochs=epochs, batch=32, lr=0.05)
    engine = EngineHooks(inference)
    generator = torch.Generator().manual_seed(seed)
    return Context(data, recipe, "cpu", seed, new_student, generator, Log(), engine=engine)
