"""What records need of finished stages: the manifests of a cell's stages, read as seldom as possible."""

from collections.abc import Mapping
from dataclasses import dataclass

from kdbench.engine.store import Json, Store

OWN_NUMBERS = ("train", "harden", "auxiliary", "steal")  # stages in which methods may write numbers down
EVALUATIONS = ("evaluate_victim", "evaluate")
OF_STUDENT = ("steal", "evaluate")
QUERIES = "queries"  # written down by the stage of an attack run itself, not by the attack


@dataclass(frozen=True, slots=True)
class Finished:
    """What a record takes from the manifest of a finished stage."""

    kind: str
    metrics: Mapping[str, float]
    seconds: float
    machine: Mapping[str, str]
    pictures: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Json) -> "Finished":
        """What it takes from this one."""
        pictures = tuple(manifest["pictures"])
        return cls(manifest["kind"], manifest["metrics"], manifest["seconds"], manifest["machine"], pictures)


class Manifests:
    """Reads manifests. Those of victims are kept until another defense is asked for, since many cells share them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._defense: str | None = None
        self._victims: dict[str, Finished] = {}

    def of_cell(self, defense: str | None, stages: Mapping[str, str]) -> dict[str, Finished]:
        """Those of a cell by stage; stages: the stages' keys."""
        if self._defense != defense:
            self._defense = defense
            self._victims.clear()
        return {stage: self._read(key) if stage in OF_STUDENT else self._kept(key) for stage, key in stages.items()}

    def _kept(self, key: str) -> Finished:
        if key not in self._victims:
            self._victims[key] = self._read(key)
        return self._victims[key]

    def _read(self, key: str) -> Finished:
        return Finished.of(self._store.manifest(key))


def metrics(found: Mapping[str, Finished]) -> dict[str, float]:
    """The metrics of a cell: what evaluations measured, and how many queries were answered."""
    measured = {name: value for stage in EVALUATIONS if stage in found for name, value in found[stage].metrics.items()}
    if "steal" in found:
        measured[QUERIES] = found["steal"].metrics[QUERIES]
    return dict(sorted(measured.items()))


def numbers(found: Mapping[str, Finished]) -> dict[str, float]:
    """What methods reported of themselves, each under the name of its stage."""
    return {
        f"{stage}.{name}": value
        for stage in OWN_NUMBERS
        if stage in found and found[stage].kind == stage  # without a hardening, the victim's training stands in for it
        for name, value in sorted(found[stage].metrics.items())
        if (stage, name) != ("steal", QUERIES)
    }
