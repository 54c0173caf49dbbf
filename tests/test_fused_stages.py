"""Fused stages: attack runs that one worker runs together end as they would alone, whatever becomes of the others."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scheduler import Scripted

from kdbench.engine import worker
from kdbench.engine.executors.local import LocalExecutor
from kdbench.engine.executors.protocol import State
from kdbench.engine.numerics import Numerics
from kdbench.engine.orders import Order, WorkerOptions
from kdbench.engine.plan import Plan
from kdbench.engine.scheduler import run_stages
from kdbench.engine.specs import StealSpec
from kdbench.engine.store import Store
from kdbench.engine.victims import LastAnswerCache
from kdbench.engine.worker import BUSY, PUBLISHED
from kdbench.records import Status
from kdbench.suites.suite import Suite
from runs import FinishedRun, RecordedProgress, publish, run, until

OPTIONS = WorkerOptions("data")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("fuse", "largest"), [(1, 1), (2, 2), (100, 4)])
def test_attack_runs_of_a_fusible_group_go_to_one_worker_but_not_what_another_could_run(
    plan: Callable[..., Plan], tmp_path: Path, fuse: int, largest: int
) -> None:
    """Four baselines while the victim is trained, then six attack runs for two workers; all other stages one by one."""
    stages, store = plan({"defenses": ["none", "stingy"]}).stages, Store(tmp_path)
    executor = Scripted(lambda key, _: publish(store, key))
    assert run_stages(stages, store, executor, RecordedProgress(), OPTIONS, fuse).problems == {}
    assert sorted(key for job in executor.jobs for key in job) == sorted(stages)
    assert max(map(len, executor.jobs)) == largest
    for job in executor.jobs:
        assert len(job) == 1 or {stages[key].kind for key in job} == {"steal"}
        assert len({stages[key].fusible_group for key in job}) == 1


def test_students_of_different_architectures_are_in_different_groups(plan: Callable[..., Plan]) -> None:
    stages = plan({"student.networks": ["mini-8", "mini-16"]}).stages.values()
    assert len({stage.fusible_group for stage in stages if stage.kind == "steal"}) == 2
    assert {stage.fusible_group for stage in stages if stage.kind != "steal"} == {""}


def test_a_fused_run_gives_what_one_by_one_does(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """Up to rounding: one image of 96 that lies on a border may fall to the other side. It is in the record, and the key."""
    cells = run(tiny(), tmp_path, fuse=8)
    assert cells.keys() == golden.cells.keys()
    for name, cell in cells.items():
        other = golden.cells[name]
        assert cell.status is other.status is Status.DONE
        assert cell.protocol.numerics == replace(other.protocol.numerics, fuse=8)
        assert not set(cell.keys.values()) & set(other.keys.values())
        assert cell.metrics.keys() == other.metrics.keys()
        assert cell.metrics.get("queries") == other.metrics.get("queries")
        for metric, value in cell.metrics.items():
            assert value == pytest.approx(other.metrics[metric], abs=1.1 / 96), metric


def test_seconds_of_fused_training_are_shared_and_waiting_is_not_counted(
    tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    start = time.monotonic()
    run(tiny(), tmp_path, fuse=100, jobs=1)
    passed, store = time.monotonic() - start, Store(tmp_path / "store")
    attack_runs = [store.manifest(key) for key in store.finished() if key.startswith("steal")]
    assert (
        0 < sum(manifest.throughput.seconds for manifest in attack_runs) < sum(m.seconds for m in attack_runs) < passed
    )


@pytest.fixture
def fused_stages(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., tuple[Store, list[str]]]:
    """A store in which all is done but the attack runs against `none`, and their keys."""

    def make(changes: dict[str, Any] | None = None) -> tuple[Store, list[str]]:
        store = Store(tmp_path)
        base = {"defenses": ["none"], "baselines": ["cross-entropy", "hard-label"], **(changes or {})}
        data = next(iter(plan(base).stages.values()))
        executor = LocalExecutor(store.root, 2)
        run_stages({data.key: data}, store, executor, RecordedProgress(), OPTIONS)
        stages = plan(base, Numerics(fuse=8), store.manifest(data.key).content).stages
        run_stages({k: s for k, s in stages.items() if s.kind == "train"}, store, executor, RecordedProgress(), OPTIONS)
        attack_runs = {key: stage for key, stage in stages.items() if stage.kind == "steal"}
        for key, stage in attack_runs.items():
            store.write_spec(key, Order(stage.title, stage.spec, OPTIONS).to_json())
        return store, list(attack_runs)

    return make


def test_an_attack_run_that_fails_costs_no_other(fused_stages: Callable[..., tuple[Store, list[str]]]) -> None:
    store, keys = fused_stages({"scenario.budget": 150})  # less than two epochs of queries about 96 images
    assert worker.run_worker(str(store.root), *keys) == worker.FAILED
    failed = {key for key in keys if store.failure(key)}
    specs = {key: Order.from_json(store.spec(key)).spec for key in keys}
    asking = {key for key, spec in specs.items() if isinstance(spec, StealSpec) and spec.victim}
    assert failed
    assert failed <= asking
    assert {key for key in keys if store.has(key)} == set(keys) - failed
    assert set(keys) - failed
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == [], name


def test_a_worker_runs_what_is_left_and_not_what_others_run(
    fused_stages: Callable[..., tuple[Store, list[str]]],
) -> None:
    store, keys = fused_stages()
    publish(store, keys[0])
    with store.claim(keys[1]):
        assert worker.run_worker(str(store.root), *keys) == BUSY
    assert not store.has(keys[1])
    assert all(store.has(key) for key in keys if key != keys[1])
    assert worker.run_worker(str(store.root), *keys) == PUBLISHED


def test_fused_stages_that_are_stopped_keep_checkpoints_of_all_and_go_on(
    fused_stages: Callable[..., tuple[Store, list[str]]],
) -> None:
    """Also with the signal in the middle of training, and each alone afterwards."""
    changes = {"student.recipe.epochs": 400, "attacks": ["kd"], "baselines": ["cross-entropy", "hard-label"]}
    store, keys = fused_stages(changes)
    executor = LocalExecutor(store.root, 1)
    [handle] = executor.submit([tuple(keys)])
    until(lambda: len(list((store.root / "work").glob("*/progress.json"))) == len(keys))
    executor.close()
    assert not any(store.has(key) or store.failure(key) for key in keys)
    assert all(store.checkpointed(key) for key in keys)
    assert executor.poll([handle])[handle].state is State.GONE
    assert worker.run_worker(str(store.root), keys[0]) == PUBLISHED
    assert worker.run_worker(str(store.root), *keys) == PUBLISHED
    data = Order.from_json(store.spec(keys[0])).spec.inputs[0]
    size = store.manifest(data).numbers["train"]
    assert all(store.manifest(key).throughput.images < 400 * size for key in keys)  # this attempt did the rest only


def test_a_cached_answer_serves_a_repeated_query() -> None:
    asked: list[torch.Tensor] = []

    def service(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return x.flatten(1).log_softmax(1)

    cached, one, other = LastAnswerCache(service), torch.rand(4, 1, 2, 2), torch.rand(4, 1, 2, 2)
    for x, times in [(one, 1), (one.clone(), 1), (other, 2), (other[:2], 3), (other, 4), (other, 4)]:
        assert torch.equal(cached(x), service(x))
        asked.pop()
        assert len(asked) == times
