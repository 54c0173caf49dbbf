"""The local engine: workers in processes of their own."""

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
from kdbench.engine.executors.local import LocalExecutor
from kdbench.engine.executors.protocol import Report, State
from kdbench.engine.plan import Numerics, make_plan
from kdbench.engine.store import Store, file_digest
from kdbench.engine.tensors import load_state
from kdbench.engine.worker import BUSY, FAILED, PUBLISHED, STOPPED
from kdbench.suites.suite import Suite
from runs import DUEL, Played, publish, until


@pytest.fixture
def long_stage(tiny: Callable[..., Suite], golden: Played, tmp_path: Path) -> Callable[..., tuple[Store, str]]:
    """Makes a store in which a training of so many epochs (hours, by default) waits to be started, and its key."""

    def make(epochs: int = 10**6) -> tuple[Store, str]:
        store = Store(golden.copy(tmp_path) / "store")
        [data] = [key for key in store.finished() if key.startswith("data/")]
        found = make_plan(tiny(DUEL | {"victim.recipe.epochs": epochs}), Numerics(), store.manifest(data)["content"])
        [stage] = [stage for stage in found.stages.values() if stage.kind == "train"]
        store.write_spec(stage.key, {"kind": stage.kind, "spec": stage.spec, "title": "long", "data_folder": "data"})
        return store, stage.key

    return make


def under_way(store: Store, key: str) -> bool:
    return bool(store.progress(key))


def test_closing_lets_workers_stop_at_a_checkpoint(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    engine = LocalExecutor(store.root, 1)
    engine.submit([(key,)])
    until(lambda: under_way(store, key))
    [worker] = multiprocessing.active_children()
    engine.close()
    assert worker.exitcode == STOPPED
    assert load_state(store.checkpoint_folder(key) / "part-1.safetensors")["state"]["epochs"] > 0
    assert not store.has(key)
    assert store.failure(key) is None
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == []


def test_closing_kills_workers_that_do_not_stop(
    long_stage: Callable[..., tuple[Store, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, key = long_stage()
    monkeypatch.setattr("kdbench.engine.executors.local.GRACE_SECONDS", 0.3)
    engine = LocalExecutor(store.root, 1)
    engine.submit([(key,)])
    until(lambda: under_way(store, key))
    [worker] = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 3
    assert worker.exitcode == -signal.SIGKILL


def test_two_workers_on_one_stage_do_no_harm(long_stage: Callable[..., tuple[Store, str]]) -> None:
    """Claims only save work: without them the second to finish discards its own, and nothing has failed."""
    store, key = long_stage(100)
    engine = LocalExecutor(store.root, 2)
    handles = []
    for _ in range(2):
        handles += engine.submit([(key,)])
        until((store.root / "claims" / key.replace("/", "-")).exists)
        (store.root / "claims" / key.replace("/", "-")).unlink()
    until(lambda: all(report.state is State.GONE for report in engine.poll(handles).values()))
    assert store.failure(key) is None
    assert os.listdir(store.root / "tmp") == []
    files = store.manifest(key)["files"]
    assert files == {name: file_digest(store.path(key) / name) for name in files}


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets a worker do something else than its stage (None: just that), in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda act: act and monkeypatch.setattr(worker, "run_stage", lambda *_: act())
    signal.signal(signal.SIGTERM, before)
    torch.use_deterministic_algorithms(False)


def test_a_stage_that_is_silent_keeps_its_claim(
    long_stage: Callable[..., tuple[Store, str]], at_work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours in one question say nothing of progress; the claim of a stage that has ended is left alone."""
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.01)
    store, key = long_stage()
    claim = store.root / "claims" / key.replace("/", "-")

    def act() -> None:
        for _ in range(2):
            os.utime(claim, (0, 0))
            until(lambda: claim.stat().st_mtime > 0)
        raise ZeroDivisionError

    at_work(act)
    threads = threading.active_count()
    assert worker.work(str(store.root), key) == FAILED
    assert threading.active_count() == threads
    assert not claim.exists()


@pytest.mark.parametrize("profile", [False, True])
def test_a_worker_writes_down_how_fast_its_trainings_were(
    long_stage: Callable[..., tuple[Store, str]], at_work: Callable[..., None], profile: bool
) -> None:
    """And measures their limit if it was told to."""
    store, key = long_stage(3)
    store.write_spec(key, {**store.spec(key), "profile": profile})
    at_work(None)
    assert worker.work(str(store.root), key) == PUBLISHED
    manifest = store.manifest(key)
    images = store.manifest(manifest["spec"]["data"]["key"])["metrics"]["train"]
    assert manifest["work"]["images"] == 3 * images
    assert 0 < manifest["work"]["seconds"] < manifest["seconds"]
    assert manifest["profile"] is profile
    assert (manifest["work"]["limit_seconds"] is not None) is profile


@pytest.mark.parametrize("published", [False, True])
def test_an_error_after_somebody_else_has_published_is_no_failure(
    long_stage: Callable[..., tuple[Store, str]], at_work: Callable[..., None], published: bool
) -> None:
    """The other has tidied up: a checkpoint that is written then finds no folder."""
    store, key = long_stage()

    def act() -> None:
        if published:
            publish(store, key)
        raise FileNotFoundError("part-1.safetensors")

    at_work(act)
    assert worker.work(str(store.root), key) == (PUBLISHED if published else FAILED)
    failure = store.failure(key)
    assert failure is None if published else failure["reason"] == "FileNotFoundError: part-1.safetensors"  # type: ignore[index]
    for name in ("claims", "tmp"):
        assert os.listdir(store.root / name) == [], name


def test_a_second_worker_on_a_stage_that_is_worked_on_is_busy(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    first, second = LocalExecutor(store.root, 1), LocalExecutor(store.root, 1)
    first.submit([(key,)])
    until(lambda: under_way(store, key))
    assert ending(second, key) == f"the worker ended with exit code {BUSY}"
    first.close()


def ending(engine: LocalExecutor, key: str) -> str:
    """How a worker on `key` ends."""
    [handle] = engine.submit([(key,)])
    while (report := engine.poll([handle])[handle]).state is State.RUNNING:
        engine.wait(1)
    assert report.state is State.GONE
    assert engine.poll([handle]) == {handle: Report(State.GONE)}  # asked again, it has forgotten the handle
    return report.detail


def test_slots_are_taken_and_given_back(long_stage: Callable[..., tuple[Store, str]]) -> None:
    store, key = long_stage()
    [published] = [other for other in store.finished() if other.startswith("train/")]
    engine = LocalExecutor(store.root, 3)
    assert engine.slots() == 3
    engine.submit([(key,), (published,)])
    assert engine.slots() == 1
    engine.close()
    assert engine.slots() == 3


def test_a_worker_on_what_is_published_ends_at_once(golden: Played) -> None:
    engine = LocalExecutor(golden.store.root, 1)
    key = next(iter(golden.store.finished()))
    before = golden.store.manifest(key)
    assert ending(engine, key) == f"the worker ended with exit code {PUBLISHED}"
    assert golden.store.manifest(key) == before


def test_a_worker_that_fails_says_so_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert ending(LocalExecutor(store.root, 1), "train/unheard-of") == f"the worker ended with exit code {FAILED}"
    failure = store.failure("train/unheard-of")
    assert failure is not None
    assert failure["reason"].startswith("FileNotFoundError")


@pytest.mark.parametrize("error", [EOFError(), ConnectionRefusedError("refused"), BrokenPipeError("pipe")], ids=repr)
def test_a_worker_that_cannot_be_started_is_a_lost_attempt_with_the_reason(
    golden: Played, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The forkserver was killed just as it was asked for a worker."""

    def fail(*_: object) -> None:
        raise error

    engine, key = LocalExecutor(golden.store.root, 1), next(iter(golden.store.finished()))
    with monkeypatch.context() as patch:
        patch.setattr(ForkServerProcess, "start", fail)
        detail = ending(engine, key)
    assert detail == f"the worker could not be started ({type(error).__name__}: {error})"
    assert engine.slots() == 1
    assert ending(engine, key) == f"the worker ended with exit code {PUBLISHED}"


def test_what_a_worker_prints_stands_in_its_log(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ending(LocalExecutor(store.root, 1), "no-kind")
    assert "ValueError" in store.log_path("no-kind").read_text()


def test_workers_run_one_thread_each_whatever_this_process_runs(golden: Played) -> None:
    """A stage's numbers depend on the threads, which the key names; the environment of the driver must not matter."""
    for key in golden.store.finished():
        assert golden.store.manifest(key)["spec"]["numerics"]["threads"] == 1
    before = dict(os.environ)
    LocalExecutor(golden.store.root, 1).submit([])
    assert dict(os.environ) == before


def test_fp32_is_not_rounded_to_ten_bits_by_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda *_, **__: None
    )  # of this process, not of the test
    for precision in ("bf16", "fp32"):
        worker._settle({"threads": torch.get_num_threads(), "device": "cpu", "precision": precision})
        assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")
