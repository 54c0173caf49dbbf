"""The local executor: workers in processes of their own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from kdbench.engine import worker
from kdbench.engine.digests import file_digest
from kdbench.engine.executors.local import LocalExecutor
from kdbench.engine.executors.protocol import Report, State
from kdbench.engine.numerics import Numerics, apply_numerics
from kdbench.engine.orders import Order, WorkerOptions
from kdbench.engine.planner import make_plan
from kdbench.engine.store import Store
from kdbench.engine.tensors import load_state
from kdbench.engine.worker import BUSY, FAILED, PUBLISHED, STOPPED
from kdbench.game.fields import plain
from kdbench.suites.suite import Suite
from runs import ONE_CELL, FinishedRun, publish, until


@pytest.fixture
def long_stage(tiny: Callable[..., Suite], golden: FinishedRun, tmp_path: Path) -> Callable[..., tuple[Store, str]]:
    """Makes a store in which a training of so many epochs (hours, by default) waits to be started, and its key."""

    def make(epochs: int = 10**6) -> tuple[Store, str]:
        store = Store(golden.copy(tmp_path) / "store")
        [data] = [key for key in store.finished() if key.startswith("data/")]
        found = make_plan(tiny(ONE_CELL | {"victim.recipe.epochs": epochs}), Numerics(), store.manifest(data).content)
        [stage] = [stage for stage in found.stages.values() if stage.kind == "train"]
        store.write_spec(stage.key, Order("long", stage.spec, WorkerOptions("data")).to_json())
        return store, stage.key

    return make


def under_way(store: Store, key: str) -> bool:
    return bool(store.progress(key))


def test_closing_lets_workers_stop_at_a_checkpoint(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    executor = LocalExecutor(store.root, 1)
    executor.submit([(key,)])
    until(lambda: under_way(store, key))
    [worker] = multiprocessing.active_children()
    executor.close()
    assert worker.exitcode == STOPPED
    assert load_state(store.checkpoint_folder(key) / "fit.1.safetensors")["state"]["epochs"] > 0
    assert not store.has(key)
    assert store.failure(key) is None
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == []


def test_closing_kills_workers_that_do_not_stop(
    long_stage: Callable[..., tuple[Store, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, key = long_stage()
    monkeypatch.setattr("kdbench.engine.executors.local.GRACE_SECONDS", 0.3)
    executor = LocalExecutor(store.root, 1)
    executor.submit([(key,)])
    until(lambda: under_way(store, key))
    [worker] = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    start = time.monotonic()
    executor.close()
    assert time.monotonic() - start < 3
    assert worker.exitcode == -signal.SIGKILL


def test_two_workers_on_one_stage_do_no_harm(long_stage: Callable[..., tuple[Store, str]]) -> None:
    """Claims only save work: without them the second to finish discards its own, and nothing has failed."""
    store, key = long_stage(100)
    executor = LocalExecutor(store.root, 2)
    handles = []
    for _ in range(2):
        handles += executor.submit([(key,)])
        until((store.root / "claims" / key.replace("/", "-")).exists)
        (store.root / "claims" / key.replace("/", "-")).unlink()
    until(lambda: all(report.state is State.GONE for report in executor.poll(handles).values()))
    assert store.failure(key) is None
    assert os.listdir(store.root / "tmp") == []
    files = store.manifest(key).files
    assert files == {name: file_digest(store.path(key) / name) for name in files}


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces what a worker runs, in this process (None: by nothing)."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda act: act and monkeypatch.setattr(worker, "run_stage", lambda *_: act())
    signal.signal(signal.SIGTERM, before)
    torch.use_deterministic_algorithms(False)


def test_a_stage_that_is_silent_keeps_its_claim(
    long_stage: Callable[..., tuple[Store, str]], replaced: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours in one question say nothing of progress; the claim of a stage that has ended is left alone."""
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.01)
    store, key = long_stage()
    claim = store.root / "claims" / key.replace("/", "-")

    def act() -> None:
        for _ in range(2):
            os.utime(claim, (0, 0))
            until(lambda: claim.stat().st_mtime > 0)
        raise ZeroDivisionError

    replaced(act)
    threads = threading.active_count()
    assert worker.run_worker(str(store.root), key) == FAILED
    assert threading.active_count() == threads
    assert not claim.exists()


@pytest.mark.parametrize("profile", [False, True])
def test_a_worker_writes_down_how_fast_its_trainings_were(
    long_stage: Callable[..., tuple[Store, str]], replaced: Callable[..., None], profile: bool
) -> None:
    """And measures their limit if it was told to."""
    store, key = long_stage(3)
    store.write_spec(key, {**store.spec(key), "options": plain(WorkerOptions("data", profile))})
    replaced(None)
    assert worker.run_worker(str(store.root), key) == PUBLISHED
    manifest = store.manifest(key)
    images = store.manifest(Order.from_json(store.spec(key)).spec.inputs[0]).numbers["train"]
    assert manifest.throughput.images == 3 * images
    assert 0 < manifest.throughput.seconds < manifest.seconds
    assert (manifest.throughput.bare_seconds is not None) is profile


@pytest.mark.parametrize("published", [False, True])
def test_an_error_after_somebody_else_has_published_is_no_failure(
    long_stage: Callable[..., tuple[Store, str]], replaced: Callable[..., None], published: bool
) -> None:
    """The other has tidied up: a checkpoint that is written then finds no folder."""
    store, key = long_stage()

    def act() -> None:
        if published:
            publish(store, key)
        raise FileNotFoundError("fit.1.safetensors")

    replaced(act)
    assert worker.run_worker(str(store.root), key) == (PUBLISHED if published else FAILED)
    failure = store.failure(key)
    assert failure is None if published else failure.reason == "FileNotFoundError: fit.1.safetensors"  # type: ignore[union-attr]
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == [], name


def test_a_second_worker_on_a_stage_that_is_running_is_busy(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    first, second = LocalExecutor(store.root, 1), LocalExecutor(store.root, 1)
    first.submit([(key,)])
    until(lambda: under_way(store, key))
    assert ending(second, key) == f"the worker ended with exit code {BUSY}"
    first.close()


def ending(executor: LocalExecutor, key: str) -> str:
    """How a worker on `key` ends."""
    [handle] = executor.submit([(key,)])
    while (report := executor.poll([handle])[handle]).state is State.RUNNING:
        executor.wait(1)
    assert report.state is State.GONE
    assert executor.poll([handle]) == {handle: Report(State.GONE)}  # asked again, it has forgotten the handle
    return report.detail


def test_slots_are_taken_and_given_back(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    [published] = [other for other in store.finished() if other.startswith("train/")]
    executor = LocalExecutor(store.root, 3)
    assert executor.slots() == 3
    executor.submit([(key,), (published,)])
    assert executor.slots() == 1
    executor.close()
    assert executor.slots() == 3


def test_a_worker_on_what_is_published_ends_at_once(golden: FinishedRun) -> None:
    executor = LocalExecutor(golden.store.root, 1)
    key = next(iter(golden.store.finished()))
    before = golden.store.manifest(key)
    assert ending(executor, key) == f"the worker ended with exit code {PUBLISHED}"
    assert golden.store.manifest(key) == before


def test_a_worker_that_fails_says_so_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert ending(LocalExecutor(store.root, 1), "train/unheard-of") == f"the worker ended with exit code {FAILED}"
    failure = store.failure("train/unheard-of")
    assert failure is not None
    assert failure.reason.startswith("FileNotFoundError")


@pytest.mark.parametrize("error", [EOFError(), ConnectionRefusedError("refused"), BrokenPipeError("pipe")], ids=repr)
def test_a_worker_that_cannot_be_started_is_a_lost_attempt_with_the_reason(
    golden: FinishedRun, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The forkserver was killed just as it was asked for a worker."""

    def fail(*_: object) -> None:
        raise error

    executor, key = LocalExecutor(golden.store.root, 1), next(iter(golden.store.finished()))
    with monkeypatch.context() as patch:
        patch.setattr(ForkServerProcess, "start", fail)
        detail = ending(executor, key)
    assert detail == f"the worker could not be started ({type(error).__name__}: {error})"
    assert executor.slots() == 1
    assert ending(executor, key) == f"the worker ended with exit code {PUBLISHED}"


def test_what_a_worker_prints_stands_in_its_log(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ending(LocalExecutor(store.root, 1), "no-kind")
    assert "ValueError" in store.log_path("no-kind").read_text()


def test_workers_run_one_thread_each_whatever_this_process_runs(golden: FinishedRun) -> None:
    """A stage's numbers depend on the threads, which the key names; the environment of the scheduler must not matter."""
    for key in golden.store.finished():
        assert Order.from_json(golden.store.spec(key)).spec.numerics.threads == 1
    before = dict(os.environ)
    LocalExecutor(golden.store.root, 1).submit([])
    assert dict(os.environ) == before


def test_fp32_is_not_rounded_to_ten_bits_by_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda *_, **__: None
    )  # of this process, not of the test
    for precision in ("bf16", "fp32"):
        apply_numerics(Numerics("cpu", precision, torch.get_num_threads()))
        assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")
