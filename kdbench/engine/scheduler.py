"""The driver: plays a plan's stages on an engine until all that can be done is done. Killing and restarting it is resuming."""

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from kdbench.engine.executors.protocol import Executor, Handle, Report, State
from kdbench.engine.plan import Plan, Stage
from kdbench.engine.store import KINDS, Store
from kdbench.engine.worker import BUSY
from kdbench.errors import KdbenchError
from kdbench.game.fields import plain

WAIT_SECONDS = 0.2
BUSY_SECONDS = 2.0  # before asking again for a stage that somebody else works on
LOST_ATTEMPTS = 3  # so many workers in a row may vanish without a word (killed, out of memory) and have saved nothing


class ProgressDisplay:
    """Somebody who wants to know how a run goes. This one lets it pass in silence."""

    def begin(self, stages: dict[str, Stage], cached: int) -> None:
        """The stages still to do, and how many were there already."""

    def started(self, stage: Stage) -> None:
        """A stage was handed to the engine."""

    def ended(self, stage: Stage, seconds: float, problem: str) -> None:
        """A stage ended; `problem` is empty when it is in the store."""

    def dropped(self, stages: list[Stage]) -> None:
        """Stages that will not be tried: something that they build on failed."""

    def tick(self, running: dict[str, tuple[Stage, float, str]]) -> None:
        """What runs now: stage, share done (0 to 1), text."""

    def close(self) -> None:
        """The run is over, however it ended."""


@dataclass
class Outcome:
    """What became of a plan's stages: finished ones lie in the store, the others have a reason here.

    seconds: how long the driver waited for each stage that was done now, from handing it over to finding it done.
    """

    problems: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerOptions:
    """What workers are told beside the specification; none of it changes what is computed.

    profile: whether trainings measure what a bare loop of theirs would do.
    """

    data_folder: str
    profile: bool = False


def run_stages(
    stages: Mapping[str, Stage],
    store: Store,
    executor: Executor,
    progress_display: ProgressDisplay,
    worker_options: WorkerOptions,
    fuse: int = 1,
) -> Outcome:
    """Do all `stages` that are not in the store. A stage that fails costs those that build on it, and no others.

    stack: how many thefts whose students may be trained as one a worker is given at most.
    """
    driver = _Driver(stages, store, executor, progress_display, worker_options, fuse)
    try:
        driver.run()
    finally:
        executor.close()
        progress_display.close()
    return driver.outcome


def force(plan: Plan, store: Store) -> None:
    """Take the plan's finished stages out of the store, so that they are done again; the data set stays."""
    for key in store.finished() & plan.stages.keys():
        if plan.stages[key].kind != "data":
            store.discard(key)


class _Driver:
    def __init__(
        self,
        stages: Mapping[str, Stage],
        store: Store,
        executor: Executor,
        progress_display: ProgressDisplay,
        worker_options: WorkerOptions,
        fuse: int,
    ) -> None:
        finished = store.finished()
        self.outcome = Outcome()
        self._store, self._executor, self._progress_display = store, executor, progress_display
        self._worker_options, self._fuse = worker_options, fuse
        self._todo = {key: stage for key, stage in stages.items() if key not in finished}
        self._missing: dict[str, int] = {}  # how many of a stage's inputs are still to be done
        self._dependents: dict[str, list[str]] = defaultdict(list)
        for key, stage in self._todo.items():
            missing = [name for name in stage.inputs if name in self._todo]
            self._missing[key] = len(missing)
            for name in missing:
                self._dependents[name].append(key)
        self._ready: list[tuple[int, int, int, str]] = []  # a heap
        self._readied = itertools.count()
        self._running: dict[Handle, float] = {}
        self._later: dict[str, float] = {}
        self._lost: Counter[str] = Counter()
        self._saved: dict[str, int] = {}
        for key, count in self._missing.items():
            if not count:
                self._ready_up(key)
        progress_display.begin(self._todo, len(stages) - len(self._todo))

    def run(self) -> None:
        while self._ready or self._running or self._later:
            self._wake()
            self._submit()
            self._progress_display.tick(self._now())
            self._executor.wait(WAIT_SECONDS)
            self._collect()

    def _ready_up(self, key: str) -> None:
        """Queue a stage: what others wait for goes first; scores, which nothing waits for, last."""
        waiting = len(self._dependents[key]) if key in self._dependents else 0
        heappush(self._ready, (KINDS.index(self._todo[key].kind), -waiting, next(self._readied), key))

    def _wake(self) -> None:
        due = [key for key, moment in self._later.items() if moment <= time.monotonic()]
        for key in due:
            del self._later[key]
            self._ready_up(key)

    def _submit(self) -> None:
        jobs: list[tuple[str, ...]] = []
        while self._ready and len(jobs) < self._executor.slots():
            jobs.append(self._job(self._executor.slots() - len(jobs)))
        for key in itertools.chain.from_iterable(jobs):
            stage = self._todo[key]
            self._store.clear_failure(key)
            order = {"kind": stage.kind, "spec": stage.spec, "title": stage.title}
            self._store.write_spec(key, {**order, **plain(self._worker_options)})
            self._progress_display.started(stage)
        for handle in self._executor.submit(jobs) if jobs else ():
            self._running[handle] = time.monotonic()

    def _job(self, slots: int) -> tuple[str, ...]:
        """The next stage, with as many of its kin as may be done beside it and are not for the other free slots to do."""
        first = heappop(self._ready)[-1]
        fusible_group = self._todo[first].fusible_group if self._fuse > 1 else ()
        if not fusible_group:
            return (first,)
        alike = sorted(entry for entry in self._ready if self._todo[entry[-1]].fusible_group == fusible_group)
        taken = set(alike[: min(self._fuse, math.ceil((len(alike) + 1) / slots)) - 1])
        self._ready = [entry for entry in self._ready if entry not in taken]
        heapify(self._ready)
        return (first, *(entry[-1] for entry in sorted(taken)))

    def _collect(self) -> None:
        reports = self._executor.poll(list(self._running))
        for handle, report in reports.items():
            if report.state is State.GONE:
                seconds = (time.monotonic() - self._running.pop(handle)) / len(handle.keys)
                for key in handle.keys:
                    self._ended(self._todo[key], seconds, report)

    def _ended(self, stage: Stage, seconds: float, report: Report) -> None:
        """Look into the store for what became of a stage whose worker is gone."""
        if self._store.has(stage.key):
            self.outcome.seconds[stage.key] = seconds
            self._progress_display.ended(stage, seconds, "")
            self._release(stage.key)
        elif failure := self._store.failure(stage.key):
            self._give_up(stage, seconds, failure["reason"])
        elif report.code == BUSY:  # somebody else is at it
            self._later[stage.key] = time.monotonic() + BUSY_SECONDS
        elif self._attempts_lost(stage.key) < LOST_ATTEMPTS:
            self._ready_up(stage.key)
        else:
            log = self._store.log_path(stage.key)
            self._give_up(stage, seconds, f"{report.detail}, {LOST_ATTEMPTS} times; its log is {log}")

    def _attempts_lost(self, key: str) -> int:
        """How many attempts in a row have vanished without a newer checkpoint; one that saved some of its work is none."""
        saved = self._store.checkpointed(key)
        self._lost[key] = self._lost[key] + 1 if saved == self._saved.get(key, 0) else 0
        self._saved[key] = saved
        return self._lost[key]

    def _release(self, key: str) -> None:
        for dependent in self._dependents.get(key, ()):
            self._missing[dependent] -= 1
            if not self._missing[dependent] and dependent not in self.outcome.problems:
                self._ready_up(dependent)

    def _give_up(self, stage: Stage, seconds: float, reason: str) -> None:
        self.outcome.problems[stage.key] = reason
        self._progress_display.ended(stage, seconds, reason)
        above = self._above(stage.key) - self.outcome.problems.keys()
        self.outcome.problems |= {key: f"'{stage.title}' failed: {reason}" for key in above}
        self._progress_display.dropped([self._todo[key] for key in above])

    def _above(self, key: str) -> set[str]:
        """All stages that build on `key`, directly or not."""
        todo, seen = [key], set[str]()
        while todo:
            new = set(self._dependents.get(todo.pop(), ())) - seen
            seen |= new
            todo.extend(new)
        return seen

    def _now(self) -> dict[str, tuple[Stage, float, str]]:
        told = {key: self._store.progress(key) for handle in self._running for key in handle.keys}
        return {key: (self._todo[key], says.get("share", 0.0), says.get("text", "")) for key, says in told.items()}


def data_digest(
    stage: Stage, store: Store, executor: Executor, progress_display: ProgressDisplay, worker_options: WorkerOptions
) -> str:
    """Read the data set into the store unless it is there; the digest of its content."""
    if not store.has(stage.key):
        outcome = run_stages({stage.key: stage}, store, executor, progress_display, worker_options)
        if outcome.problems:
            raise KdbenchError(next(iter(outcome.problems.values())))
    content: str = store.manifest(stage.key)["content"]
    return content
