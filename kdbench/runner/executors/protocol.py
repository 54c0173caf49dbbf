"""What every engine offers the driver. Engines start `kdbench.runner.worker` with a store and a key, and know nothing else."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class State(StrEnum):
    """What an engine says of a job. GONE: the engine no longer has it, look into the store."""

    QUEUED = "queued"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Handle:
    """One attempt at one stage. `id` is the engine's, `key` the stage's."""

    engine: str
    id: str
    key: str


@dataclass(frozen=True)
class Report:
    """What the engine says of a handle; `detail` in the engine's words, for people only."""

    state: State
    detail: str = ""


class Executor(Protocol):
    """An engine. Exit codes are hints: the driver looks into the store for what became of a stage."""

    name: str

    def slots(self) -> int:
        """How many more stages may be submitted now."""

    def submit(self, keys: Sequence[str]) -> list[Handle]:
        """Start a worker for each key."""

    def poll(self, handles: Collection[Handle]) -> dict[Handle, Report]:
        """The state of each handle; never raises."""

    def wait(self, seconds: float) -> None:
        """Sleep until a job may have ended, at most so long."""

    def close(self) -> None:
        """End all workers: ask them to stop, then make them."""
