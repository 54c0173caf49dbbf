"""The parts of specifications that many stages share: frozen values, each digested once."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict

from kdbench import registry
from kdbench.engine.digests import json_digest
from kdbench.engine.manifest import Json
from kdbench.engine.numerics import Numerics
from kdbench.evaluation.adversarial import Robustness
from kdbench.game.data import DataSubset
from kdbench.game.fields import build, plain
from kdbench.game.methods import Recipe
from kdbench.game.threat import Scenario

Keys = tuple[str, ...]
T = TypeVar("T")
CHECKED = ConfigDict(extra="forbid", strict=True)
"""How specifications are read back from JSON."""


class Part:
    """A frozen value that many specifications share: its digest is made once."""

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED

    @cached_property
    def digest(self) -> str:
        """The digest of all its fields."""
        return json_digest(digested_fields(self))


@dataclass(frozen=True)
class MethodSpec(Part):
    """A registered method, data set or kind of victim: its name, its fields, and the digest of its code."""

    method: str
    fields: dict[str, Any]
    source: str

    def make(self, kind: str, base: type[T]) -> T:
        """The object itself; kind: that of its registration.

        Raises `KdbenchError` when nothing of that name is registered, or a field is unknown or wrong.
        """
        made = build(registry.load(kind, self.method), self.fields, f"{kind}.{self.method}")
        assert isinstance(made, base), f"the {kind} '{self.method}' is no {base.__name__}"
        return made


@dataclass(frozen=True)
class CodeSpec(Part):
    """Something registered that has no fields here: its name, and the digest of its code."""

    name: str
    source: str


@dataclass(frozen=True)
class NetworkSpec(CodeSpec):
    """A registered architecture."""


@dataclass(frozen=True)
class DataRef(Part):
    """A decoded data set: the stage that has it, and the digest of its content."""

    key: str
    content: str


@dataclass(frozen=True)
class SurrogateSpec(Part):
    """A surrogate data set of an attack: its registered name, and the decoded data."""

    name: str
    data: DataRef


@dataclass(frozen=True)
class RunSpec(Part):
    """What all stages of a plan share but those that decode data. code: the digest of the rules, of training and of stages."""

    data: DataRef
    numerics: Numerics
    code: str


@dataclass(frozen=True)
class EvaluationSpec(Part):
    """How networks are evaluated. code: the digest of the evaluation."""

    robustness: Robustness
    code: str


@dataclass(frozen=True)
class TrainingSpec(Part):
    """The network of one side of a cell, and how that side trains."""

    network: NetworkSpec
    recipe: Recipe


@dataclass(frozen=True)
class VictimSpec(Part):
    """A victim behind a defense, ready to serve.

    victim: its kind. key: the stage that has the deployed model. auxiliary: the stage that has the auxiliary model, ""
    where there is none. defense: what acts on answers; None where nothing does.
    """

    victim: MethodSpec
    key: str
    auxiliary: str
    defense: MethodSpec | None
    training: TrainingSpec
    seed: int

    @property
    def inputs(self) -> Keys:
        """The stages it is made of."""
        return (self.key, self.auxiliary) if self.auxiliary else (self.key,)


@dataclass(frozen=True)
class AttackSpec(Part):
    """An attack in a scenario, on a subset of the attacker's data.

    networks: what it trains beside students. simulated: the defenses that it simulates.
    """

    attack: MethodSpec
    scenario: Scenario
    subset: DataSubset
    networks: tuple[NetworkSpec, ...] = ()
    simulated: tuple[CodeSpec, ...] = ()
    surrogates: tuple[SurrogateSpec, ...] = ()


def digested_fields(value: Any) -> Json:
    """The fields of a dataclass, each part among them as its digest, all else as JSON has it."""
    return {field.name: _digested(getattr(value, field.name)) for field in fields(value)}


def _digested(value: object) -> object:
    if isinstance(value, Part):
        return value.digest
    if isinstance(value, tuple):
        return [_digested(item) for item in value]
    return plain(value)
