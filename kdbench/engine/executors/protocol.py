"""What every executor offers the scheduler. Executors start `kdbench.engine.worker` with a store and keys, and know no more.

An executor is registered in the entry point group `kdbench.executors` as a `MakeExecutor`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol


class State(StrEnum):
    """What an executor says of a job. GONE: the executor no longer has it, look into the store."""

    QUEUED = "queued"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Handle:
    """One attempt at one stage, or at several that a worker runs together. `id` is the executor's."""

    executor: str
    id: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What the executor says of a handle; `detail` is for people only. code: the worker's exit code."""

    state: State
    detail: str = ""
    code: int | None = None


class Executor(Protocol):
    """Starts workers. Exit codes are hints: the scheduler looks into the store for what became of a stage."""

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


MakeExecutor = Callable[[Path, int], Executor]
"""What is registered: (folder of the store, number of workers at once) -> executor."""
