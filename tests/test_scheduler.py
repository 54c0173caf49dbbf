"""The scheduler, with executors that run nothing."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kdbench.engine import scheduler
from kdbench.engine.executors.protocol import Handle, Report, State
from kdbench.engine.manifest import Failure
from kdbench.engine.orders import Order, WorkerOptions
from kdbench.engine.plan import Plan
from kdbench.engine.scheduler import LOST_ATTEMPTS, run_stages
from kdbench.engine.store import Store
from kdbench.engine.tensors import save_state
from kdbench.engine.worker import BUSY
from runs import ON_NASTY, ONE_CELL, VICTIMS, RecordedProgress, cell, publish

OPTIONS = WorkerOptions("data")


@dataclass
class Scripted:
    """An executor whose workers do what `act` does, at once; each handle is reported by the script, then GONE."""

    act: Callable[[str, int], str]
    script: Sequence[State] = ()
    name: str = "scripted"
    attempts: Counter[str] = field(default_factory=Counter)
    code: int | None = None
    details: dict[Handle, str] = field(default_factory=dict)
    polls: Counter[Handle] = field(default_factory=Counter)
    closed: int = 0
    jobs: list[tuple[str, ...]] = field(default_factory=list)

    def slots(self) -> int:
        return 2 - len(self.details)

    def submit(self, jobs: Sequence[tuple[str, ...]]) -> list[Handle]:
        self.jobs.extend(jobs)
        handles = []
        for keys in jobs:
            self.attempts.update(keys)
            handles.append(Handle(self.name, str(self.attempts[keys[0]]), keys))
            self.details[handles[-1]] = next(iter([self.act(key, self.attempts[key]) for key in keys]))
        return handles

    def poll(self, handles: Collection[Handle]) -> dict[Handle, Report]:
        self.polls.update(handles)
        states = {h: [*self.script, State.GONE][min(self.polls[h] - 1, len(self.script))] for h in handles}
        return {
            h: Report(s, self.details.pop(h), self.code) if s is State.GONE else Report(s) for h, s in states.items()
        }

    def wait(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def test_a_worker_that_dies_after_it_has_published_counts_as_done(plan: Callable[..., Plan], tmp_path: Path) -> None:
    store = Store(tmp_path)
    executor = Scripted(lambda key, _: publish(store, key) and "the worker was killed by signal 9")
    outcome = run_stages(plan(ONE_CELL).stages, store, executor, RecordedProgress(), OPTIONS)
    assert outcome.problems == {}
    assert set(executor.attempts.values()) == {1}


def test_a_worker_that_ends_well_without_publishing_is_not_believed(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(ONE_CELL).stages, Store(tmp_path)
    executor = Scripted(lambda key, _: "the worker ended with exit code 0")
    outcome = run_stages(stages, store, executor, RecordedProgress(), OPTIONS)
    assert set(outcome.problems) == set(stages)
    assert executor.attempts == {next(iter(stages)): LOST_ATTEMPTS}


def test_an_executor_that_does_not_answer_changes_nothing(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(ONE_CELL).stages, Store(tmp_path)
    script = (State.QUEUED, State.UNKNOWN, State.UNKNOWN, State.RUNNING, State.UNKNOWN)
    executor = Scripted(lambda key, _: publish(store, key), script)
    assert run_stages(stages, store, executor, RecordedProgress(), OPTIONS).problems == {}
    assert executor.attempts == dict.fromkeys(stages, 1)


@pytest.mark.parametrize(("code", "attempts"), [(BUSY, 2 * LOST_ATTEMPTS), (40, LOST_ATTEMPTS), (49, LOST_ATTEMPTS)])
def test_only_a_worker_that_was_busy_is_no_attempt(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, attempts: int
) -> None:
    """It says so by its exit code, whole: 40 is another one."""
    monkeypatch.setattr(scheduler, "BUSY_SECONDS", 0.0)
    stages, store = plan(ONE_CELL).stages, Store(tmp_path)

    def act(key: str, attempt: int) -> str:
        return publish(store, key) if attempt == 2 * LOST_ATTEMPTS else f"the worker ended with exit code {code}"

    executor = Scripted(act, code=code)
    outcome = run_stages(stages, store, executor, RecordedProgress(), OPTIONS)
    assert executor.attempts[next(iter(stages))] == attempts
    assert bool(outcome.problems) is (code != BUSY)


def test_an_attempt_that_saved_some_of_its_work_is_not_lost(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """A worker that is killed every hour and saves every half gets through; once it saves nothing more, it is given up."""
    stages, store = plan(ONE_CELL).stages, Store(tmp_path)
    saves, first = 4 * LOST_ATTEMPTS, next(iter(stages))

    def act(key: str, attempt: int) -> str:
        if attempt <= saves:
            save_state({"epochs": attempt}, path := store.checkpoint_folder(key) / "part-1.safetensors")
            os.utime(path, (attempt, attempt))
        return "the worker was killed by signal 9"

    executor = Scripted(act)
    outcome = run_stages(stages, store, executor, RecordedProgress(), OPTIONS)
    assert executor.attempts == {first: saves + LOST_ATTEMPTS}
    assert outcome.problems[first].startswith("the worker was killed by signal 9, 3 times; its log is ")


def test_workers_are_told_what_a_key_means_and_their_options(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(ONE_CELL).stages, Store(tmp_path)
    executor = Scripted(lambda key, _: publish(store, key))
    outcome = run_stages(stages, store, executor, RecordedProgress(), WorkerOptions("images", profile=True))
    for key, stage in stages.items():
        assert Order.from_json(store.spec(key)) == Order(stage.title, stage.spec, WorkerOptions("images", profile=True))
    assert outcome.seconds.keys() == stages.keys()


def test_what_builds_on_a_failure_says_what_failed(plan: Callable[..., Plan], tmp_path: Path) -> None:
    found, store = plan(), Store(tmp_path)
    titles = {key: stage.title for key, stage in found.stages.items()}

    def act(key: str, _: int) -> str:
        if titles[key] in ("harden by nasty, seed 0", "kd from stingy, seed 0"):
            store.fail(key, Failure(f"{key} broke"))
            return "the worker ended with exit code 1"
        return publish(store, key)

    outcome = run_stages(found.stages, store, Scripted(act), RecordedProgress(), OPTIONS)
    problems = {titles[key]: reason for key, reason in outcome.problems.items()}
    broken = {title: key for key, title in titles.items()}
    harden, steal = broken["harden by nasty, seed 0"], broken["kd from stingy, seed 0"]
    assert problems == {
        "harden by nasty, seed 0": f"{harden} broke",
        "kd from stingy, seed 0": f"{steal} broke",
        "evaluate kd on stingy, seed 0": f"'kd from stingy, seed 0' failed: {steal} broke",
        **dict.fromkeys(ON_NASTY, f"'harden by nasty, seed 0' failed: {harden} broke"),
    }
    assert store.finished() == found.stages.keys() - outcome.problems.keys()


def test_a_failure_reaches_what_builds_on_it_through_others(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """An attack run against a hardened model does not name the victim that was hardened."""
    found, store, progress_display = plan(), Store(tmp_path), RecordedProgress()
    victim = cell(found, "nasty", "kd").stages["train"]

    def act(key: str, _: int) -> str:
        if key == victim:
            store.fail(key, Failure("it broke"))
            return "the worker ended with exit code 1"
        return publish(store, key)

    outcome = run_stages(found.stages, store, Scripted(act), progress_display, OPTIONS)
    failed = {found.stages[key].title.removesuffix(", seed 0") for key in outcome.problems}
    assert failed == VICTIMS
    assert {title.removesuffix(", seed 0") for title in progress_display.lost} == VICTIMS - {"train the victim"}
    assert store.finished() == found.stages.keys() - outcome.problems.keys()


def test_an_old_failure_is_cleared_before_another_attempt(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(ONE_CELL).stages, Store(tmp_path)
    for key in stages:
        store.fail(key, Failure("yesterday's"))
    executor = Scripted(
        lambda key, attempt: publish(store, key) if attempt == 2 else "the worker was killed by signal 9"
    )
    assert run_stages(stages, store, executor, RecordedProgress(), OPTIONS).problems == {}
    assert os.listdir(store.root / "failures") == []


def test_attack_runs_go_before_evaluations_that_nothing_builds_on(plan: Callable[..., Plan], tmp_path: Path) -> None:
    found, store, progress_display = plan(), Store(tmp_path), RecordedProgress()
    run_stages(found.stages, store, Scripted(lambda key, _: publish(store, key)), progress_display, OPTIONS)
    kinds = [stage.kind for stage in progress_display.finished]
    assert kinds.index("evaluate") > max(index for index, kind in enumerate(kinds) if kind == "steal") - 2


def test_the_executor_and_the_display_are_closed_whatever_happens(plan: Callable[..., Plan], tmp_path: Path) -> None:
    def interrupt(key: str, attempt: int) -> str:
        raise KeyboardInterrupt

    executor, progress_display = Scripted(interrupt), RecordedProgress()
    with pytest.raises(KeyboardInterrupt):
        run_stages(plan(ONE_CELL).stages, Store(tmp_path), executor, progress_display, OPTIONS)
    assert (executor.closed, progress_display.closed) == (1, 1)
