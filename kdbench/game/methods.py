"""What a defense and an attack are, and all that they may use."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.game.data import DataSubset, Split
from kdbench.game.fields import Checked, Count, NonNegative, Positive, Share, Whole
from kdbench.game.threat import Access, Oracle, Service


@dataclass(frozen=True)
class Recipe(Checked):
    """How a network is trained; the same for all who play on one side of a benchmark.

    lr is multiplied by gamma at each milestone (0-based epochs), or follows a half cosine to 0. crop: pixels of zero
    padding for random crops (0: none). flip: random horizontal flips. clip: largest gradient norm (0: no limit).
    """

    epochs: Count = 30
    batch: Count = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 0.1
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 5e-4
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[Whole, ...] = ()
    gamma: Positive = 0.1
    crop: Whole = 0
    flip: bool = False
    clip: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise KdbenchError("Recipe.nesterov needs a momentum above 0.")


class Log:
    """What a method may write down. This one keeps numbers in memory; the runner's also keeps pictures and checkpoints."""

    profiling: bool = False
    """Whether fits shall measure their limit too."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self._slots = 0

    def __call__(self, name: str, value: float) -> None:
        """Write down a number, such as the final value of a loss."""
        self.numbers[name] = float(value)

    def images(self, name: str, x: Tensor) -> None:
        """Write down images (N,C,H,W) in [0,1], to be looked at."""

    def progress(self, share: float, text: str) -> None:
        """Say how far the work at hand is, from 0 to 1."""

    def timed(self, images: int, seconds: float, limit: float | None) -> None:
        """Say that training took so many `seconds` for so many `images`.

        limit: images/s of a bare loop of forward, backward and step of the same modules, where it was measured.
        """

    def slot(self) -> str:
        """A name for the next piece of work that can be resumed; the same in every run of the same stage."""
        self._slots += 1
        return f"part-{self._slots}"

    def due(self) -> bool:
        """Whether it is time to save."""
        return False

    def save(self, slot: str, state: Mapping[str, Any]) -> None:
        """Keep `state` (nested mappings and lists of tensors and plain values) for a resumed run."""

    def load(self, slot: str) -> Any:
        """What an interrupted run kept under `slot`, or None. Random generators and the query count go back with it."""
        return None


Precision = Literal["fp32", "bf16"]


def no_surrogate(name: str) -> Tensor:
    """Where no public data set was asked for beforehand, there is none."""
    raise KdbenchError(f"The public data set '{name}' must be named by the attack's publics().")


class NewStudent(Protocol):
    """Makes a fresh network: of this side's own architecture, or of a registered one by name."""

    def __call__(self, name: str | None = None) -> nn.Module: ...


@dataclass(frozen=True)
class Context:
    """All that a method may use; neither side can reach the other.

    data: the images this side owns. recipe: how this side trains. new_student: a fresh network on the device, of this
    side's architecture (for a defense: the victim's) or of a named one, initialised from the seed and the number of
    calls so far. generator: the only source of randomness, on the device. precision: of forward and backward passes;
    weights, losses and optimisers are always fp32. compile: whether networks are compiled before they are trained or
    asked. company: whom `fit` hands its work to first, where several stages train their networks together. public: the
    training images (N,C,H,W) in [0,1] of a data set that anybody can have, by its name, in the shape of the own images.
    companion: what `Defense.auxiliary` made, for `serve`; None where it has not been called.
    """

    data: Split
    recipe: Recipe
    device: str
    seed: int
    new_student: NewStudent
    generator: torch.Generator
    log: Log = field(default_factory=Log)
    precision: Precision = "fp32"
    compile: bool = False
    fused: Callable[[Any], None] | None = None
    surrogate: Callable[[str], Tensor] = no_surrogate
    auxiliary: nn.Module | None = None

    def training(self, **changes: Any) -> "Context":
        """The same context with some fields of the recipe changed."""
        return replace(self, recipe=replace(self.recipe, **changes))


@dataclass(frozen=True)
class Defense(Checked):
    """Subclass = frozen dataclass; its fields are the hyper-parameters. Override `harden`, `serve`, or both."""

    stateful: ClassVar[bool] = False
    """Whether answers may depend on what was asked before: then a repeated question may get another answer."""

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        """The model to deploy instead of `victim` (training time, once per victim, cached); default: the victim itself."""
        return victim

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module | None:
        """A second network of the victim's architecture that `serve` needs beside `model` (trained once, cached).

        `serve` finds it as `ctx.auxiliary`, in eval mode. Default: there is none.
        """
        return None

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        """The service that answers questions (once per attacker, may keep state); default: log-softmax of the logits."""
        return lambda x: model(x).log_softmax(dim=1)


@dataclass(frozen=True)
class Attack(Checked):
    """Subclass = frozen dataclass; its fields are the hyper-parameters. Override `steal` and say what it needs."""

    needs: ClassVar[Access]
    """The least grant it can work with; granted less, the cell is skipped. NOTHING makes it a baseline."""
    adaptive: ClassVar[bool] = False
    """Whether it was made to undo defenses: a defense that no adaptive attack was run against stays "unexamined"."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        """A student."""
        raise NotImplementedError

    def data_subset(self) -> DataSubset:
        """Which part of the thief's data it uses; its baselines are trained on the same part. Default: all."""
        return DataSubset()

    def networks(self) -> tuple[str, ...]:
        """Registered networks it will ask `ctx.new_student` for, so that a misspelt one is found before any training."""
        return ()

    def surrogate_datasets(self) -> tuple[str, ...]:
        """Registered data sets whose images it will ask `ctx.surrogate` for; never the one that the game is about."""
        return ()


def derive(seed: int, *role: object) -> int:
    """A seed for one role ("victim", "student", ...) of a cell, below 2^63: roles do not share random numbers."""
    text = "/".join(str(part) for part in (seed, *role))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Fix torch's global generators inside, and leave them as they were: for code that draws from nowhere else."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it seeds every device there is, and only these are put back.
        torch.default_generator.manual_seed(seed)
        for name in devices:
            with torch.cuda.device(name):
                torch.cuda.manual_seed(seed)
        yield


def draw_seed(generator: torch.Generator) -> int:
    """A seed drawn from `generator`."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
