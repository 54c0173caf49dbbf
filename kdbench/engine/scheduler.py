"""The scheduler: hands a plan's stages to an executor until all that can be done is done. Restarting it is resuming."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from kdbench.engine.executors.protocol import Executor, Handle, Report, State
from kdbench.engine.manifest import Progress
from kdbench.engine.orders import Order, WorkerOptions
from kdbench.engine.plan import Plan, Stage
from kdbench.engine.stage_queue import StageQueue
from kdbench.engine.store import Store
from kdbench.engine.worker import BUSY
from kdbench.errors import KdbenchError

WAIT_SECONDS = 0.2
BUSY_SECONDS = 2.0  # before asking again for a stage that another run has claimed
LOST_ATTEMPTS = 3  # so many workers in a row may vanish without a word (killed, out of memory) and have saved nothing


class ProgressDisplay:
    """Shows how a run goes. This one shows nothing."""

    def begin(self, stages: dict[str, Stage], cached: int) -> None:
        """The stages still to do, and how many are in the store already."""

    def started(self, stage: Stage) -> None:
        """A stage was handed to the executor."""

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

    seconds: how long the scheduler waited for each stage that was done now, from handing it over to finding it done.
    """

    problems: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_stages(
    stages: Mapping[str, Stage],
    store: Store,
    executor: Executor,
    progress_display: ProgressDisplay,
    worker_options: WorkerOptions,
    fuse: int = 1,
) -> Outcome:
    """Do all `stages` that are not in the store. A stage that fails costs those that build on it, and no others.

    fuse: how many attack runs whose students may be trained together a worker is given at most.
    """
    finished = store.finished()
    todo = {key: stage for key, stage in stages.items() if key not in finished}
    run = _Run(todo, store, executor, progress_display, StageQueue(todo, fuse))
    progress_display.begin(todo, len(stages) - len(todo))
    try:
        run.to_end(worker_options)
    finally:
        executor.close()
        progress_display.close()
    return run.outcome


def discard_stages(plan: Plan, store: Store) -> None:
    """Take the plan's finished stages out of the store, so that they are done again; data sets stay."""
    data = {stage.key for stage in plan.stages.values() if not stage.inputs}
    for key in (store.finished() & plan.stages.keys()) - data:
        store.discard(key)


def data_digest(
    stage: Stage, store: Store, executor: Executor, progress_display: ProgressDisplay, worker_options: WorkerOptions
) -> str:
    """Decode the data set into the store unless it is there; the digest of its content."""
    if not store.has(stage.key):
        outcome = run_stages({stage.key: stage}, store, executor, progress_display, worker_options)
        if outcome.problems:
            raise KdbenchError(next(iter(outcome.problems.values())))
    return store.manifest(stage.key).content


class _Run:
    """One run of the stages `todo`."""

    def __init__(
        self,
        todo: dict[str, Stage],
        store: Store,
        executor: Executor,
        progress_display: ProgressDisplay,
        queue: StageQueue,
    ) -> None:
        self.outcome = Outcome()
        self._todo, self._queue = todo, queue
        self._store, self._executor, self._progress_display = store, executor, progress_display
        self._running: dict[Handle, float] = {}  # since when
        self._waiting: dict[str, float] = {}  # stages claimed by another run, and when to try them again
        self._lost: Counter[str] = Counter()
        self._saved: dict[str, int] = {}

    def to_end(self, worker_options: WorkerOptions) -> None:
        """Until nothing is left that can be done."""
        while self._queue or self._running or self._waiting:
            self._try_again()
            self._submit(worker_options)
            self._progress_display.tick(self._progress())
            self._executor.wait(WAIT_SECONDS)
            self._collect()

    def _try_again(self) -> None:
        due = [key for key, moment in self._waiting.items() if moment <= time.monotonic()]
        for key in due:
            del self._waiting[key]
            self._queue.push(key)

    def _submit(self, worker_options: WorkerOptions) -> None:
        jobs: list[tuple[str, ...]] = []
        while self._queue and len(jobs) < self._executor.slots():
            jobs.append(self._queue.pop(self._executor.slots() - len(jobs)))
        for key in (key for job in jobs for key in job):
            stage = self._todo[key]
            self._store.clear_failure(key)
            self._store.write_spec(key, Order(stage.title, stage.spec, worker_options).to_json())
            self._progress_display.started(stage)
        for handle in self._executor.submit(jobs) if jobs else ():
            self._running[handle] = time.monotonic()

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
            self._queue.done(stage.key)
        elif failure := self._store.failure(stage.key):
            self._give_up(stage, seconds, failure.reason)
        elif report.code == BUSY:  # another run has claimed it
            self._waiting[stage.key] = time.monotonic() + BUSY_SECONDS
        elif self._attempts_lost(stage.key) < LOST_ATTEMPTS:
            self._queue.push(stage.key)
        else:
            log = self._store.log_path(stage.key)
            self._give_up(stage, seconds, f"{report.detail}, {LOST_ATTEMPTS} times; its log is {log}")

    def _attempts_lost(self, key: str) -> int:
        """How many attempts in a row have vanished without a newer checkpoint; one that saved some work does not count."""
        saved = self._store.checkpointed(key)
        self._lost[key] = self._lost[key] + 1 if saved == self._saved.get(key, 0) else 0
        self._saved[key] = saved
        return self._lost[key]

    def _give_up(self, stage: Stage, seconds: float, reason: str) -> None:
        """The stage failed, and what builds on it cannot be done."""
        self.outcome.problems[stage.key] = reason
        self._progress_display.ended(stage, seconds, reason)
        above = [key for key in self._queue.above(stage.key) if key not in self.outcome.problems]
        self.outcome.problems |= {key: f"'{stage.title}' failed: {reason}" for key in above}
        self._progress_display.dropped([self._todo[key] for key in above])

    def _progress(self) -> dict[str, tuple[Stage, float, str]]:
        nothing = Progress(0.0, "")
        reported = {k: self._store.progress(k) or nothing for handle in self._running for k in handle.keys}
        return {key: (self._todo[key], one.share, one.text) for key, one in reported.items()}
