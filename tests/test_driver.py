"""The driver, with engines of paper."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kdbench.runner.executors.protocol import Handle, Report, State
from kdbench.runner.matrix import LOST_ATTEMPTS, play
from kdbench.runner.plan import Plan
from kdbench.runner.store import Store
from runs import DUEL, ON_NASTY, VICTIMS, Recorder, cell, publish


@dataclass
class Paper:
    """An engine whose workers do what `act` does, at once; each handle is reported by the script, then GONE."""

    act: Callable[[str, int], str]
    script: Sequence[State] = ()
    name: str = "paper"
    attempts: Counter[str] = field(default_factory=Counter)
    details: dict[Handle, str] = field(default_factory=dict)
    polls: Counter[Handle] = field(default_factory=Counter)
    closed: int = 0

    def slots(self) -> int:
        return 2 - len(self.details)

    def submit(self, keys: Sequence[str]) -> list[Handle]:
        handles = []
        for key in keys:
            self.attempts[key] += 1
            handles.append(Handle(self.name, str(self.attempts[key]), key))
            self.details[handles[-1]] = self.act(key, self.attempts[key])
        return handles

    def poll(self, handles: Collection[Handle]) -> dict[Handle, Report]:
        self.polls.update(handles)
        states = {h: [*self.script, State.GONE][min(self.polls[h] - 1, len(self.script))] for h in handles}
        return {h: Report(s, self.details.pop(h) if s is State.GONE else "") for h, s in states.items()}

    def wait(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def test_a_worker_that_dies_after_it_has_published_counts_as_done(plan: Callable[..., Plan], tmp_path: Path) -> None:
    store = Store(tmp_path)
    engine = Paper(lambda key, _: publish(store, key) and "the worker was killed by signal 9")
    outcome = play(plan(DUEL).stages, store, engine, Recorder(), "data")
    assert outcome.problems == {}
    assert set(engine.attempts.values()) == {1}


def test_a_worker_that_ends_well_without_publishing_is_not_believed(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(DUEL).stages, Store(tmp_path)
    engine = Paper(lambda key, _: "the worker ended with exit code 0")
    outcome = play(stages, store, engine, Recorder(), "data")
    assert set(outcome.problems) == set(stages)
    assert engine.attempts == {next(iter(stages)): LOST_ATTEMPTS}


def test_an_engine_that_does_not_answer_changes_nothing(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(DUEL).stages, Store(tmp_path)
    script = (State.QUEUED, State.UNKNOWN, State.UNKNOWN, State.RUNNING, State.UNKNOWN)
    engine = Paper(lambda key, _: publish(store, key), script)
    assert play(stages, store, engine, Recorder(), "data").problems == {}
    assert engine.attempts == dict.fromkeys(stages, 1)


def test_what_builds_on_a_failure_says_what_failed(plan: Callable[..., Plan], tmp_path: Path) -> None:
    found, store = plan(), Store(tmp_path)
    labels = {key: stage.label for key, stage in found.stages.items()}

    def act(key: str, _: int) -> str:
        if labels[key] in ("harden by nasty, seed 0", "kd from stingy, seed 0"):
            store.fail(key, {"reason": f"{key} broke"})
            return "the worker ended with exit code 1"
        return publish(store, key)

    outcome = play(found.stages, store, Paper(act), Recorder(), "data")
    problems = {labels[key]: reason for key, reason in outcome.problems.items()}
    broken = {label: key for key, label in labels.items()}
    harden, steal = broken["harden by nasty, seed 0"], broken["kd from stingy, seed 0"]
    assert problems == {
        "harden by nasty, seed 0": f"{harden} broke",
        "kd from stingy, seed 0": f"{steal} broke",
        "score kd on stingy, seed 0": f"'kd from stingy, seed 0' failed: {steal} broke",
        **dict.fromkeys(ON_NASTY, f"'harden by nasty, seed 0' failed: {harden} broke"),
    }
    assert store.published() == found.stages.keys() - outcome.problems.keys()


def test_a_failure_reaches_what_builds_on_it_through_others(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """A theft from a hardened model does not name the victim that was hardened."""
    found, store, watcher = plan(), Store(tmp_path), Recorder()
    victim = cell(found, "nasty", "kd").stages["train"]

    def act(key: str, _: int) -> str:
        if key == victim:
            store.fail(key, {"reason": "it broke"})
            return "the worker ended with exit code 1"
        return publish(store, key)

    outcome = play(found.stages, store, Paper(act), watcher, "data")
    failed = {found.stages[key].label.removesuffix(", seed 0") for key in outcome.problems}
    assert failed == VICTIMS
    assert {label.removesuffix(", seed 0") for label in watcher.lost} == VICTIMS - {"train the victim"}
    assert store.published() == found.stages.keys() - outcome.problems.keys()


def test_an_old_failure_is_forgiven_before_another_attempt(plan: Callable[..., Plan], tmp_path: Path) -> None:
    stages, store = plan(DUEL).stages, Store(tmp_path)
    for key in stages:
        store.fail(key, {"reason": "yesterday's"})
    engine = Paper(lambda key, attempt: publish(store, key) if attempt == 2 else "the worker was killed by signal 9")
    assert play(stages, store, engine, Recorder(), "data").problems == {}
    assert os.listdir(store.root / "failures") == []


def test_thefts_go_before_scores_that_nothing_waits_for(plan: Callable[..., Plan], tmp_path: Path) -> None:
    found, store, watcher = plan(), Store(tmp_path), Recorder()
    play(found.stages, store, Paper(lambda key, _: publish(store, key)), watcher, "data")
    kinds = [stage.kind for stage in watcher.finished]
    assert kinds.index("score") > max(index for index, kind in enumerate(kinds) if kind == "steal") - 2


def test_the_engine_and_the_display_are_closed_whatever_happens(plan: Callable[..., Plan], tmp_path: Path) -> None:
    def interrupt(key: str, attempt: int) -> str:
        raise KeyboardInterrupt

    engine, watcher = Paper(interrupt), Recorder()
    with pytest.raises(KeyboardInterrupt):
        play(plan(DUEL).stages, Store(tmp_path), engine, watcher, "data")
    assert (engine.closed, watcher.closed) == (1, 1)
