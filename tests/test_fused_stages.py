"""Crews: thefts that one worker does side by side end as they would alone, whatever becomes of the others."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scheduler import Scripted

from kdbench.engine import worker
from kdbench.engine.executors.local import LocalExecutor
from kdbench.engine.executors.protocol import State
from kdbench.engine.plan import Numerics, Plan
from kdbench.engine.scheduler import WorkerOptions, run_stages
from kdbench.engine.stages import LastAnswerCache
from kdbench.engine.store import Store
from kdbench.engine.worker import BUSY, PUBLISHED
from kdbench.records import Status
from kdbench.suites.suite import Suite
from runs import FinishedRun, RecordedProgress, publish, run, until

TERMS = WorkerOptions("data")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("stack", "largest"), [(1, 1), (2, 2), (100, 4)])
def test_thefts_of_a_kind_go_to_one_worker_but_not_what_another_could_do(
    plan: Callable[..., Plan], tmp_path: Path, stack: int, largest: int
) -> None:
    """Four baselines while the victim is trained, then six thefts for two workers; all other stages one by one."""
    stages, store = plan({"defenses": ["none", "stingy"]}).stages, Store(tmp_path)
    engine = Paper(lambda key, _: publish(store, key))
    assert run_stages(stages, store, engine, RecordedProgress(), TERMS, stack).problems == {}
    assert sorted(key for job in engine.jobs for key in job) == sorted(stages)
    assert max(map(len, engine.jobs)) == largest
    for job in engine.jobs:
        assert len(job) == 1 or {stages[key].kind for key in job} == {"steal"}
        assert len({stages[key].fusible_group for key in job}) == 1


def test_thefts_by_students_of_different_architectures_are_no_kin(plan: Callable[..., Plan]) -> None:
    stages = plan({"student.networks": ["mini-8", "mini-16"]}).stages.values()
    assert len({stage.fusible_group for stage in stages if stage.kind == "steal"}) == 2
    assert {stage.fusible_group for stage in stages if stage.kind != "steal"} == {()}


def test_a_stacked_run_gives_what_one_by_one_does(golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path) -> None:
    """Up to rounding: one image of 96 that lies on a border may fall to the other side. It is in the record, and the key."""
    cells = run(tiny(), tmp_path, fuse=8)
    assert cells.keys() == golden.cells.keys()
    for name, cell in cells.items():
        other = golden.cells[name]
        assert cell.status is other.status is Status.DONE
        assert cell.protocol["numerics"] == {**other.protocol["numerics"], "stack": 8}
        assert not set(cell.keys.values()) & set(other.keys.values())
        assert cell.metrics.keys() == other.metrics.keys()
        assert cell.metrics.get("queries") == other.metrics.get("queries")
        for metric, value in cell.metrics.items():
            assert value == pytest.approx(other.metrics[metric], abs=1.1 / 96), metric


def test_seconds_of_a_stack_are_shared_and_waiting_is_nobodys(tiny: Callable[..., Suite], tmp_path: Path) -> None:
    start = time.monotonic()
    run(tiny(), tmp_path, fuse=100, jobs=1)
    passed, store = time.monotonic() - start, Store(tmp_path / "store")
    attack_runs = [store.manifest(key) for key in store.finished() if key.startswith("steal")]
    assert (
        0
        < sum(manifest["work"]["seconds"] for manifest in attack_runs)
        < sum(m["seconds"] for m in attack_runs)
        < passed
    )


@pytest.fixture
def fused_stages(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., tuple[Store, list[str]]]:
    """A store in which all is done but the thefts from `none`, and their keys."""

    def make(changes: dict[str, Any] | None = None) -> tuple[Store, list[str]]:
        store = Store(tmp_path)
        base = {"defenses": ["none"], "baselines": ["cross-entropy", "hard-label"], **(changes or {})}
        data = next(iter(plan(base).stages.values()))
        engine = LocalExecutor(store.root, 2)
        run_stages({data.key: data}, store, engine, RecordedProgress(), TERMS)
        stages = plan(base, Numerics(fuse=8), store.manifest(data.key)["content"]).stages
        run_stages({k: s for k, s in stages.items() if s.kind == "train"}, store, engine, RecordedProgress(), TERMS)
        attack_runs = {key: stage for key, stage in stages.items() if stage.kind == "steal"}
        for key, stage in attack_runs.items():
            store.write_spec(
                key,
                {"kind": "steal", "spec": stage.spec, "label": stage.title, "data_folder": "data", "profile": False},
            )
        return store, list(attack_runs)

    return make


def test_a_theft_that_fails_costs_no_other(fused_stages: Callable[..., tuple[Store, list[str]]]) -> None:
    store, keys = fused_stages({"scenario.budget": 150})  # less than two epochs of questions about 96 images
    assert worker.work(str(store.root), *keys) == worker.FAILED
    failed = {key for key in keys if store.failure(key)}
    asking = {
        key for key in keys if store.spec(key)["spec"]["victim"] and not store.spec(key)["spec"]["subset"]["seed"]
    }
    assert failed
    assert failed <= asking
    assert {key for key in keys if store.has(key)} == set(keys) - failed
    assert set(keys) - failed
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == [], name


def test_a_crew_does_what_is_left_and_not_what_others_do(fused_stages: Callable[..., tuple[Store, list[str]]]) -> None:
    store, keys = fused_stages()
    publish(store, keys[0])
    with store.claim(keys[1]):
        assert worker.work(str(store.root), *keys) == BUSY
    assert not store.has(keys[1])
    assert all(store.has(key) for key in keys if key != keys[1])
    assert worker.work(str(store.root), *keys) == PUBLISHED


def test_a_crew_that_is_stopped_keeps_checkpoints_of_all_and_goes_on(
    fused_stages: Callable[..., tuple[Store, list[str]]],
) -> None:
    """Also with the signal in the middle of what it trains, and alone afterwards."""
    changes = {"student.recipe.epochs": 400, "attacks": ["kd"], "baselines": ["cross-entropy", "hard-label"]}
    store, keys = fused_stages(changes)
    engine = LocalExecutor(store.root, 1)
    [handle] = engine.submit([tuple(keys)])
    until(lambda: len(list((store.root / "work").glob("*/progress.json"))) == len(keys))
    engine.close()
    assert not any(store.has(key) or store.failure(key) for key in keys)
    assert all(store.checkpointed(key) for key in keys)
    assert engine.poll([handle])[handle].state is State.GONE
    assert worker.work(str(store.root), keys[0]) == PUBLISHED
    assert worker.work(str(store.root), *keys) == PUBLISHED
    images = store.manifest(keys[0])["spec"]["data"]["key"]
    size = store.manifest(images)["metrics"]["train"]
    assert all(store.manifest(key)["work"]["images"] < 400 * size for key in keys)  # this attempt did the rest only


def test_an_echo_answers_a_repeated_question_without_asking_again() -> None:
    asked: list[torch.Tensor] = []

    def service(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return x.flatten(1).log_softmax(1)

    echo, one, other = LastAnswerCache(service), torch.rand(4, 1, 2, 2), torch.rand(4, 1, 2, 2)
    for x, times in [(one, 1), (one.clone(), 1), (other, 2), (other[:2], 3), (other, 4), (other, 4)]:
        assert torch.equal(echo(x), service(x))
        asked.pop()
        assert len(asked) == times
