"""The driver: plays a plan's stages on an engine until all that can be done is done. Killing and restarting it is resuming."""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from kdbench.errors import KdbenchError
from kdbench.runner.executors.protocol import Executor, Handle, State
from kdbench.runner.plan import Plan, Stage
from kdbench.runner.store import KINDS, Store

WAIT_SECONDS = 0.2
BUSY_SECONDS = 2.0  # before asking again for a stage that somebody else works on
LOST_ATTEMPTS = 3  # a worker that vanishes without a word (killed, out of memory) is given so many attempts


class Watcher:
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
    """What became of a plan's stages: finished ones lie in the store, the others have a reason here."""

    problems: dict[str, str] = field(default_factory=dict)


def play(stages: dict[str, Stage], store: Store, executor: Executor, watcher: Watcher, data_folder: str) -> Outcome:
    """Do all `stages` that are not in the store. A stage that fails costs those that build on it, and no others."""
    driver = _Driver(stages, store, executor, watcher, data_folder)
    try:
        driver.run()
    finally:
        executor.close()
        watcher.close()
    return driver.outcome


def force(plan: Plan, store: Store) -> None:
    """Take the plan's finished stages out of the store, so that they are done again; the data set stays."""
    for stage in plan.stages.values():
        if stage.kind != "data":
            store.discard(stage.key)


class _Driver:
    def __init__(
        self, stages: dict[str, Stage], store: Store, executor: Executor, watcher: Watcher, data_folder: str
    ) -> None:
        published = store.published()
        self.outcome = Outcome()
        self._store, self._executor, self._watcher, self._data_folder = store, executor, watcher, data_folder
        self._todo = {key: stage for key, stage in stages.items() if key not in published}
        self._missing = {key: {i for i in stage.inputs if i in self._todo} for key, stage in self._todo.items()}
        self._dependents: dict[str, set[str]] = defaultdict(set)
        for key, inputs in self._missing.items():
            for name in inputs:
                self._dependents[name].add(key)
        self._ready = [key for key, inputs in self._missing.items() if not inputs]
        self._running: dict[Handle, float] = {}
        self._later: dict[str, float] = {}
        self._lost: Counter[str] = Counter()
        watcher.begin(self._todo, len(stages) - len(self._todo))

    def run(self) -> None:
        while self._ready or self._running or self._later:
            self._wake()
            self._submit()
            self._watcher.tick(self._now())
            self._executor.wait(WAIT_SECONDS)
            self._collect()

    def _wake(self) -> None:
        due = [key for key, moment in self._later.items() if moment <= time.monotonic()]
        for key in due:
            del self._later[key]
            self._ready.append(key)

    def _submit(self) -> None:
        # What others wait for goes first; scores, which nothing waits for, last.
        self._ready.sort(key=lambda key: (KINDS.index(self._todo[key].kind), -len(self._dependents[key])))
        chosen, self._ready = self._ready[: self._executor.slots()], self._ready[self._executor.slots() :]
        for key in chosen:
            stage = self._todo[key]
            self._store.forgive(key)
            order = {"kind": stage.kind, "spec": stage.spec, "label": stage.label, "data_folder": self._data_folder}
            self._store.write_spec(key, order)
            self._watcher.started(stage)
        for handle in self._executor.submit(chosen) if chosen else ():
            self._running[handle] = time.monotonic()

    def _collect(self) -> None:
        reports = self._executor.poll(list(self._running))
        for handle, report in reports.items():
            if report.state is State.GONE:
                seconds = time.monotonic() - self._running.pop(handle)
                self._ended(self._todo[handle.key], seconds, report.detail)

    def _ended(self, stage: Stage, seconds: float, detail: str) -> None:
        """Look into the store for what became of a stage whose worker is gone."""
        if self._store.has(stage.key):
            self._watcher.ended(stage, seconds, "")
            self._release(stage.key)
        elif failure := self._store.failure(stage.key):
            self._give_up(stage, seconds, failure["reason"])
        elif "exit code 4" in detail:  # somebody else is at it
            self._later[stage.key] = time.monotonic() + BUSY_SECONDS
        elif self._lost[stage.key] + 1 < LOST_ATTEMPTS:
            self._lost[stage.key] += 1
            self._ready.append(stage.key)
        else:
            self._give_up(
                stage, seconds, f"{detail}, {LOST_ATTEMPTS} times; its log is {self._store.log_path(stage.key)}"
            )

    def _release(self, key: str) -> None:
        for dependent in self._dependents[key]:
            self._missing[dependent].discard(key)
            if not self._missing[dependent] and dependent not in self.outcome.problems:
                self._ready.append(dependent)

    def _give_up(self, stage: Stage, seconds: float, reason: str) -> None:
        self.outcome.problems[stage.key] = reason
        self._watcher.ended(stage, seconds, reason)
        above = self._above(stage.key) - self.outcome.problems.keys()
        self.outcome.problems |= {key: f"'{stage.label}' failed: {reason}" for key in above}
        self._watcher.dropped([self._todo[key] for key in above])

    def _above(self, key: str) -> set[str]:
        """All stages that build on `key`, directly or not."""
        todo, seen = [key], set[str]()
        while todo:
            for dependent in self._dependents[todo.pop()] - seen:
                seen.add(dependent)
                todo.append(dependent)
        return seen

    def _now(self) -> dict[str, tuple[Stage, float, str]]:
        told = {handle.key: self._store.progress(handle.key) for handle in self._running}
        return {key: (self._todo[key], says.get("share", 0.0), says.get("text", "")) for key, says in told.items()}


def data_digest(stage: Stage, store: Store, executor: Executor, watcher: Watcher, data_folder: str) -> str:
    """Read the data set into the store unless it is there; the digest of its content."""
    if not store.has(stage.key):
        outcome = play({stage.key: stage}, store, executor, watcher, data_folder)
        if outcome.problems:
            raise KdbenchError(next(iter(outcome.problems.values())))
    content: str = store.manifest(stage.key)["content"]
    return content
