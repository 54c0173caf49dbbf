"""What several test files need: a context on tiny data."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdbench import registry
from kdbench.api import Context, Images, Log, Recipe, Service, Split, fit, predict_logits, seeded
from kdbench.game.methods import EngineHooks
from kdbench.game.roles import Role, derive
from kdbench.training.fit import inference
from kdbench.zoo.datasets import Blobs

# Logits of a student and of a teacher, and a label, for which the papers' formulas were computed by hand.
S = torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64)
T = torch.tensor([[3.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
Y = torch.tensor([0])


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


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def taught(data: Split, epochs: int = 2, seed: int = 0, model: str = "mini-8") -> nn.Module:
    """A frozen network trained on the labels alone, with the draws that a defense would make."""
    ctx = context(data, epochs=epochs, seed=seed, model=model)
    net = ctx.new_student()
    fit(net, cross_entropy, data.x, data.y, ctx)
    return net.requires_grad_(False)


def undefended(model: nn.Module) -> Service:
    """The service of an undefended victim."""
    return lambda x: predict_logits(model, x).log_softmax(dim=1)


def remembering(ctx: Context) -> tuple[Context, list[nn.Module]]:
    """The same context, and the networks it will have made."""
    made: list[nn.Module] = []

    def new_student(name: str | None = None) -> nn.Module:
        made.append(ctx.new_student(name))
        return made[-1]

    return replace(ctx, new_student=new_student), made


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights and statistics are the same, bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def accuracy(model: nn.Module, split: Split) -> float:
    return float((predict_logits(model, split.x).argmax(dim=1) == split.y).float().mean())


def near(value: Tensor, expected: object, digits: int = 9) -> None:
    """Equal up to the last of `digits` printed digits after the point."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.double().reshape(wanted.shape), wanted, rtol=0, atol=0.6 * 10**-digits)
