"""Migration: records of schema 1, one JSON file a cell under `cells/`, as JSON of the present schema."""

import shutil
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import to_json

from kdbench.errors import KdbenchError, invalid

FOLDER = "cells"
REFERENCE, LABELS_ONLY = "none", "hard-label"  # methods that said nothing of this themselves under schema 1
STAGES = ("train", "harden", "equip", "steal")
_STAGE = {"equip": "auxiliary", "score": "evaluate", "audit": "evaluate_victim"}
_METRIC = {"agreement": "fidelity", "victim_repeat": "victim_consistency"}
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Json = dict[str, Any]


@dataclass(frozen=True, config=_STRICT)
class _Method:
    label: str
    method: str
    fields: Json
    origin: str
    recipe: Json | None

    def renamed(self) -> Json:
        record = {"name": self.label, "method": self.method, "fields": self.fields, "origin": self.origin}
        return record | {"recipe": self.recipe}


@dataclass(frozen=True, config=_STRICT)
class _Threat:
    answers: str
    topk: int
    budget: int | None
    data: float
    labels: bool

    def renamed(self) -> Json:
        owned = {"data": self.data, "labels": self.labels}
        return {"name": "default", "access": self.answers, "topk": self.topk, "budget": self.budget, **owned}


@dataclass(frozen=True, config=_STRICT)
class _Owned:
    fraction: float
    seed: int


@dataclass(frozen=True, config=_STRICT)
class _Figure:
    metric: str
    value: float
    source: str
    evidence: str


@dataclass(frozen=True, config=_STRICT)
class _Numerics:
    device: str
    precision: str
    threads: int
    compile: bool = False
    stack: int = 1

    def renamed(self) -> Json:
        numerics = {"device": self.device, "precision": self.precision, "threads": self.threads}
        return numerics | {"compile": self.compile, "fuse": self.stack}


@dataclass(frozen=True, config=_STRICT)
class _Protocol:
    victim_recipe: Json
    student_recipe: Json
    robustness: Json
    numerics: _Numerics

    def renamed(self) -> Json:
        recipes = {"victim_recipe": self.victim_recipe, "student_recipe": self.student_recipe}
        return recipes | {"robustness": self.robustness, "numerics": self.numerics.renamed()}


@dataclass(frozen=True, config=_STRICT)
class _Cell:
    """A record of schema 1, in the words of that time."""

    suite: str
    dataset: str
    dataset_digest: str
    classes: int
    victim: str
    student: str
    defense: _Method | None
    attack: _Method
    adaptive: bool
    seed: int
    threat: _Threat
    owned: _Owned
    tolerance: float
    status: str
    reason: str
    metrics: dict[str, float]
    seconds: dict[str, float]
    keys: dict[str, str]
    pictures: list[str]
    protocol: _Protocol
    machine: dict[str, str]
    published: list[_Figure]
    stateful: bool
    schema: int

    def renamed(self) -> Json:
        """The same in the words of schema 2."""
        own = {name: value for name, value in self.metrics.items() if _is_own(name)}
        measured = {name: value for name, value in self.metrics.items() if not _is_own(name)}
        return {
            **{name: getattr(self, name) for name in _UNCHANGED},
            "defense": self._defense(),
            "attack": self._attack(),
            "scenario": self.threat.renamed(),
            "subset": {"fraction": self.owned.fraction, "seed": self.owned.seed},
            "metrics": {_metric(name): value for name, value in measured.items()},
            "numbers": {_number(name): value for name, value in own.items()},
            "seconds": {_STAGE.get(stage, stage): value for stage, value in self.seconds.items()},
            "keys": {_STAGE.get(stage, stage): key for stage, key in self.keys.items()},
            "protocol": self.protocol.renamed(),
            "reported": [_reported(figure) for figure in self.published],
            "schema": 2,
        }

    def _defense(self) -> Json | None:
        if self.defense is None:
            return None
        is_reference = self.defense.method == REFERENCE
        return self.defense.renamed() | {"stateful": self.stateful, "is_reference": is_reference}

    def _attack(self) -> Json:
        labels_only = self.attack.method == LABELS_ONLY
        return self.attack.renamed() | {"adaptive": self.adaptive, "labels_only": labels_only}


_UNCHANGED = (
    *("suite", "dataset", "dataset_digest", "classes", "victim", "student"),
    *("seed", "tolerance", "status", "reason", "pictures", "machine"),
)
_ADAPTER = TypeAdapter(_Cell)


def is_old(folder: Path) -> bool:
    """Whether a results folder holds records of schema 1."""
    return (folder / FOLDER).is_dir()


def files(folder: Path) -> list[Path]:
    """The records of schema 1 in a results folder."""
    return sorted((folder / FOLDER).glob("*.json"))


def migrated(path: Path) -> bytes:
    """The JSON of a record of the present schema, of a file of schema 1.

    Raises `KdbenchError` when the file cannot be read or is not such a record.
    """
    try:
        old = _ADAPTER.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise KdbenchError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        raise invalid(error, str(path)) from None
    if old.schema != 1:
        raise KdbenchError(f"{path}: schema must be 1 in this layout, not {old.schema}.")
    return to_json(old.renamed())


def remove(folder: Path) -> None:
    """Remove the records of schema 1 from a results folder."""
    shutil.rmtree(folder / FOLDER)


def _is_own(metric: str) -> bool:
    """Whether it is a number that a method wrote down, under the name of its stage."""
    return metric.partition(".")[0] in STAGES


def _number(name: str) -> str:
    stage, _, rest = name.partition(".")
    return f"{_STAGE.get(stage, stage)}.{rest}"


def _metric(name: str) -> str:
    return _METRIC.get(name, name.replace("_adv_", "_robust_"))


def _reported(figure: _Figure) -> Json:
    said = {"metric": _metric(figure.metric), "value": figure.value}
    return said | {"source": figure.source, "evidence": figure.evidence}
