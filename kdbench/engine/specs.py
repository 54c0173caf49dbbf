"""Specifications of stages: one frozen dataclass a kind. They become JSON where a worker takes over, and nowhere else.

A specification says all that its stage's result depends on, and names the finished stages that it builds on by their keys.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kdbench.engine.digests import json_digest
from kdbench.engine.manifest import Json
from kdbench.engine.numerics import Numerics
from kdbench.engine.parts import (
    CHECKED,
    AttackSpec,
    EvaluationSpec,
    Keys,
    MethodSpec,
    NetworkSpec,
    Part,
    RunSpec,
    TrainingSpec,
    VictimSpec,
    digested_fields,
)
from kdbench.errors import KdbenchError

SCHEMA = 3  # part of every key: raise it when a field gets another meaning under the same name


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """The student to evaluate: the attack run that made it, and its architecture."""

    key: str
    network: NetworkSpec


@dataclass(frozen=True)
class DataSpec(Part):
    """Decode a data set.

    files: the digest of its files, where its fields do not decide the images. code: the digest of the rules and of stages.
    """

    kind: ClassVar[str] = "data"
    dataset: MethodSpec
    files: str
    code: str
    numerics: Numerics = field(default_factory=Numerics)

    @property
    def inputs(self) -> Keys:
        """None."""
        return ()


@dataclass(frozen=True)
class TrainSpec(Part):
    """Make the undefended victim."""

    kind: ClassVar[str] = "train"
    run: RunSpec
    victim: MethodSpec
    training: TrainingSpec
    seed: int

    @property
    def numerics(self) -> Numerics:
        """Those of the run."""
        return self.run.numerics

    @property
    def inputs(self) -> Keys:
        """The data."""
        return (self.run.data.key,)


@dataclass(frozen=True)
class HardenSpec(Part):
    """Harden a victim. victim: the stage that has it."""

    kind: ClassVar[str] = "harden"
    run: RunSpec
    victim: str
    defense: MethodSpec
    training: TrainingSpec
    seed: int

    @property
    def numerics(self) -> Numerics:
        """Those of the run."""
        return self.run.numerics

    @property
    def inputs(self) -> Keys:
        """The data and the victim."""
        return self.run.data.key, self.victim


@dataclass(frozen=True)
class AuxiliarySpec(HardenSpec):
    """Make the auxiliary model of a defense. victim: the stage that has the deployed model."""

    kind: ClassVar[str] = "auxiliary"


@dataclass(frozen=True, slots=True)
class StealSpec:
    """Run an attack. victim: None for a no-query baseline."""

    kind: ClassVar[str] = "steal"
    __pydantic_config__: ClassVar[ConfigDict] = CHECKED
    run: RunSpec
    victim: VictimSpec | None
    attack: AttackSpec
    training: TrainingSpec
    seed: int

    @property
    def numerics(self) -> Numerics:
        """Those of the run."""
        return self.run.numerics

    @property
    def inputs(self) -> Keys:
        """The data, what the victim is made of, and the surrogate data."""
        surrogates = (surrogate.data.key for surrogate in self.attack.surrogates)
        return self.run.data.key, *(self.victim.inputs if self.victim else ()), *surrogates


@dataclass(frozen=True, slots=True)
class EvaluateSpec:
    """Evaluate a student, beside the victim that it was trained against, if there is one; or, without a student, a victim."""

    kind: ClassVar[str] = "evaluate"
    __pydantic_config__: ClassVar[ConfigDict] = CHECKED
    run: RunSpec
    evaluation: EvaluationSpec
    victim: VictimSpec | None
    student: StudentSpec | None
    seed: int

    @property
    def numerics(self) -> Numerics:
        """Those of the run."""
        return self.run.numerics

    @property
    def inputs(self) -> Keys:
        """The data, what the victim is made of, and the attack run."""
        student = (self.student.key,) if self.student else ()
        return self.run.data.key, *(self.victim.inputs if self.victim else ()), *student


StageSpec = DataSpec | TrainSpec | HardenSpec | AuxiliarySpec | StealSpec | EvaluateSpec
_KINDS: Mapping[str, type[StageSpec]] = {
    cls.kind: cls for cls in (DataSpec, TrainSpec, HardenSpec, AuxiliarySpec, StealSpec, EvaluateSpec)
}


def stage_key(spec: StageSpec) -> str:
    """<kind>/<digest of the specification>; parts that many stages share are digested once."""
    return f"{spec.kind}/{json_digest({'schema': SCHEMA, 'kind': spec.kind, 'spec': digested_fields(spec)})}"


def read_spec(value: Json) -> StageSpec:
    """The specification in an order, or in the manifest of a finished stage.

    Raises `KdbenchError` when another version of kdbench wrote it.
    """
    try:
        spec: StageSpec = _adapter(value["kind"]).validate_json(json.dumps(value["spec"]))
        return spec
    except (KeyError, ValidationError) as error:
        raise _unreadable(error) from None


@cache
def _adapter(kind: str) -> TypeAdapter[StageSpec]:
    return TypeAdapter(_KINDS[kind])


def _unreadable(error: KeyError | ValidationError) -> KdbenchError:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"]
    else:
        where, what = str(error.args[0]), "is missing or unknown"
    return KdbenchError(f"The specification of a stage was written by another version of kdbench ({where}: {what}).")
