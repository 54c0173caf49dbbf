"""What a defense and an attack are, and all that they may use."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.game.data import DataSubset, Split
from kdbench.game.fields import Checked, Count, NonNegative, Positive, Share, Whole
from kdbench.game.threat import Access, Oracle, Service


@dataclass(frozen=True)
class Recipe(Checked):
    """How a network is trained; the same for all methods on one side of a benchmark.

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


class Checkpoint:
    """The state of one long computation, kept under a name. This one keeps nothing; the engine's writes it to disk."""

    def load(self) -> Any:
        """What an interrupted run saved last, or None. Random generators and the query count go back with it."""
        return None

    def due(self) -> bool:
        """Whether it is time to save."""
        return False

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state` (nested mappings and lists of tensors and plain values) for a resumed run."""


class Log:
    """What a method may write down. This one keeps numbers in memory; the engine's also keeps images and checkpoints."""

    profiling: bool = False
    """Whether the throughput of a bare loop is measured for every fit."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self._fits = 0

    def __call__(self, name: str, value: float) -> None:
        """Write down a number, such as the final value of a loss."""
        self.numbers[name] = float(value)

    def images(self, name: str, x: Tensor, labels: Tensor | None = None) -> None:
        """Keep images (N,C,H,W) in [0,1] for people to look at; labels (N,): the classes they are meant to show."""

    def progress(self, share: float, text: str) -> None:
        """Report how much of the current computation is done, from 0 to 1."""

    def timed(self, images: int, seconds: float, bare: float | None) -> None:
        """Count a training that took so many `seconds` for so many `images`.

        bare: images/s of a bare loop of forward, backward and step of the same modules, where it was measured.
        """

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of that name, such as "student/3": the same one in every run of the same stage."""
        return Checkpoint()

    def next_fit(self) -> str:
        """The checkpoint name of a fit that was given none: fits without a name are numbered in their order."""
        self._fits += 1
        return f"fit/{self._fits}"


Precision = Literal["fp32", "bf16"]


def no_surrogate(name: str) -> Tensor:
    """Raises `KdbenchError`: the stage has no surrogate data."""
    raise KdbenchError(f"The surrogate data set '{name}' must be named by the attack's surrogate_datasets().")


class NewStudent(Protocol):
    """Makes a fresh network: of this side's own architecture, or of a registered one by name."""

    def __call__(self, name: str | None = None) -> nn.Module: ...


def plain_inference(model: nn.Module, ctx: "Context") -> Service:
    """A frozen copy of `model` in eval mode as it is: images (N,C,H,W) -> logits (N,K), without gradient."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)

    def ask(x: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = frozen(x)
        return z

    return ask


@dataclass(frozen=True)
class EngineHooks:
    """What the engine puts into a context for its own code; methods do not use it.

    inference: how `Defense.serve` and `Context.auxiliary_logits` ask a network. fused: takes over a training loop where
    several stages train their networks together.
    """

    inference: "Callable[[nn.Module, Context], Service]" = plain_inference
    fused: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Context:
    """All that a method may use; neither side can reach the other.

    data: the images this side owns. recipe: how this side trains. new_student: a fresh network on the device, of this
    side's architecture (for a defense: the victim's) or of a named one, initialised from the seed and the number of
    calls so far. generator: the only source of randomness, on the device. precision: of forward and backward passes;
    weights, losses and optimisers are always fp32. compile: whether networks are compiled before they are trained or
    asked. surrogate: the training images (N,C,H,W) in [0,1] of a data set that `Attack.surrogate_datasets` names, in the
    shape of the own images. auxiliary: the network that `Defense.auxiliary` made, in eval mode and frozen; None where
    there is none. engine: the engine's own, not for methods.
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
    engine: EngineHooks = field(default_factory=EngineHooks, repr=False)
    surrogate: Callable[[str], Tensor] = no_surrogate
    auxiliary: nn.Module | None = None

    def training(self, **changes: Any) -> "Context":
        """The same context with some fields of the recipe changed."""
        return replace(self, recipe=replace(self.recipe, **changes))

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of that name, such as "student/3", for a computation that a stopped run resumes."""
        return self.log.checkpoint(name)

    def secret(self, name: str) -> int:
        """A number in [0, 2^63) that the seed of this context and `name` decide: the same one at every call."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/secret/{name}".encode()).digest()[:8], "big") >> 1

    def auxiliary_logits(self, x: Tensor) -> Tensor:
        """Logits (N,K) of the auxiliary model for images `x` (N,C,H,W), without gradient.

        Raises `KdbenchError` when there is no auxiliary model.
        """
        return self._ask_auxiliary(x)

    @cached_property
    def _ask_auxiliary(self) -> Service:
        if self.auxiliary is None:
            raise KdbenchError("this defense answers with the help of an auxiliary model, and the context has none")
        return self.engine.inference(self.auxiliary, self)


@dataclass(frozen=True)
class Defense(Checked):
    """Subclass = frozen dataclass; its fields are the hyper-parameters.

    Override `harden` (acts at training time) or `perturb` (acts on answers), or both; `serve` for what keeps state or
    needs more than log-probabilities.
    """

    stateful: ClassVar[bool] = False
    """Whether answers may depend on what was asked before: then a repeated question may get another answer."""
    is_reference: ClassVar[bool] = False
    """Whether it is the undefended victim, with which boards compare all others."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields that suite files may still write under an older name: old name -> field."""

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        """The model to deploy instead of `victim` (training time, once per victim, cached); default: the victim itself."""
        return victim

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module | None:
        """A second network of the victim's architecture that answering needs beside `model` (trained once, cached).

        `perturb` and `serve` find it as `ctx.auxiliary`, in eval mode and frozen. Default: there is none.
        """
        return None

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """What is answered, log-probabilities (N,K) with -inf for a withheld class; default: `log_p` itself.

        log_p: the deployed model's log-probabilities (N,K) for the images `x` (N,C,H,W) in [0,1]. Called batch after
        batch; an answer may depend on its own image, on `ctx.auxiliary` and on `ctx.secret`, not on other images.
        """
        return log_p

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        """The service that answers questions (opened once per attacker, may keep state); default: see `perturb`."""
        if ctx.auxiliary is None and has_auxiliary(self):
            ctx = with_auxiliary(self, model, ctx)
        ask = ctx.engine.inference(model, ctx)
        return lambda x: self.perturb(ask(x).log_softmax(dim=1), x, ctx)


@dataclass(frozen=True)
class Attack(Checked):
    """Subclass = frozen dataclass; its fields are the hyper-parameters. Override `steal` and say what it needs."""

    needs: ClassVar[Access]
    """The least access it can work with; granted less, the cell is skipped. NOTHING makes it a no-query baseline."""
    adaptive: ClassVar[bool] = False
    """Whether it was made to undo defenses: boards warn of a defense that no adaptive attack was run against."""
    labels_only: ClassVar[bool] = False
    """Whether it uses the label of an answer and nothing else, as an attacker of label-only answers does."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields that suite files may still write under an older name: old name -> field."""

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        """A student."""
        raise NotImplementedError

    def data_subset(self) -> DataSubset:
        """Which part of the attacker's data it uses; its baselines are trained on the same part. Default: all."""
        return DataSubset()

    def networks(self) -> tuple[str, ...]:
        """Registered networks it will ask `ctx.new_student` for, so that a misspelt one is found before any training."""
        return ()

    def surrogate_datasets(self) -> tuple[str, ...]:
        """Registered data sets whose images it will ask `ctx.surrogate` for; never the one under attack."""
        return ()

    def simulated_defenses(self) -> tuple[str, ...]:
        """Registered defenses that it simulates: their code is part of what its result depends on."""
        return ()


def hardens(defense: Defense) -> bool:
    """Whether it makes a model of its own; otherwise the victim is deployed as it is."""
    return type(defense).harden is not Defense.harden


def acts_on_answers(defense: Defense) -> bool:
    """Whether it acts when answering."""
    cls = type(defense)
    return cls.perturb is not Defense.perturb or cls.serve is not Defense.serve


def has_auxiliary(defense: Defense) -> bool:
    """Whether it needs a second network to answer."""
    return type(defense).auxiliary is not Defense.auxiliary


def with_auxiliary(defense: Defense, model: nn.Module, ctx: Context) -> Context:
    """The context with the auxiliary network that `defense` makes for `model`, in eval mode and frozen."""
    auxiliary = defense.auxiliary(model, ctx)
    return ctx if auxiliary is None else replace(ctx, auxiliary=auxiliary.eval().requires_grad_(False))
