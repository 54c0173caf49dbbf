"""What records need of finished stages: the manifests of a cell's stages, read as seldom as possible."""

from collections.abc import Mapping
from dataclasses import dataclass

from kdbench.engine.manifest import Manifest
from kdbench.engine.store import Store

OF_STUDENT = ("steal", "evaluate")  # stages that no two cells share


@dataclass(frozen=True, slots=True)
class Finished:
    """What records take from the manifest of a finished stage: it is smaller, and many are kept."""

    kind: str
    metrics: Mapping[str, float]
    numbers: Mapping[str, float]
    pictures: tuple[str, ...]
    seconds: float
    machine: Mapping[str, str]

    @classmethod
    def of(cls, found: Manifest) -> "Finished":
        """What they take from this one."""
        return cls(found.kind, found.metrics, found.numbers, found.pictures, found.seconds, found.machine)


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
    """The metrics that the stages of a cell measured, sorted by name."""
    return dict(sorted(item for manifest in found.values() for item in manifest.metrics.items()))


def numbers(found: Mapping[str, Finished]) -> dict[str, float]:
    """What methods reported of themselves, each under the name of its stage, sorted by name."""
    return {
        f"{stage}.{name}": value
        for stage, manifest in found.items()
        if manifest.kind == stage  # without a hardening, the victim's training stands in for it
        for name, value in sorted(manifest.numbers.items())
    }
