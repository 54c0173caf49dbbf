"""What every engine offers the driver. Engines start `kdbench.engine.worker` with a store and keys, and know nothing else."""

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
    """One attempt at one stage, or at several that a worker does side by side. `id` is the engine's."""

    engine: str
    id: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What the engine says of a handle; `detail` in the engine's words, for people only. code: the worker's exit code."""

    state: State
    detail: str = ""
    code: int | None = None


class Executor(Protocol):
    """An engine. Exit codes are hints: the driver looks into the store for what became of a stage."""

    name: str

    def slots(self) -> int:
        """How many more workers may be started now."""

    def submit(self, jobs: Sequence[tuple[str, ...]]) -> list[Handle]:
        """Start a worker for each job, the keys of one stage or of several."""

    def poll(self, handles: Collection[Handle]) -> dict[Handle, Report]:
        """The state of each handle; never raises."""

    def wait(self, seconds: float) -> None:
        """Sleep until a job may have ended, at most so long."""

    def close(self) -> None:
        """End all workers: ask them to stop, then make them."""
