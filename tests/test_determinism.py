"""The same key is the same bits: serial, parallel, interrupted anywhere and resumed, by one scheduler or by two."""

import os
import random
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scheduler_processes import (
    DEADLY,
    HOURS,
    SUITE,
    SchedulerProcess,
    Traces,
    assert_same,
    assert_tidy,
    linux,
    send,
    until,
)

from kdbench.records import Status

STRIKES = 20


@pytest.fixture(scope="module")
def schedulers() -> Iterator[list[SchedulerProcess]]:
    """Scheduler processes to be killed at the end, however the tests end."""
    kept: list[SchedulerProcess] = []
    yield kept
    for scheduler in kept:
        for pid in scheduler.alive():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(schedulers: list[SchedulerProcess], tmp_path_factory: pytest.TempPathFactory) -> tuple[Traces, Traces]:
    """The same suite by one worker and by two, each in a store of its own, at the same time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pair = [SchedulerProcess(folder / f"jobs{jobs}", jobs, checkpoint_seconds=30).start() for jobs in (1, 2)]
    schedulers += pair
    for scheduler in pair:
        scheduler.ended(0)
        assert_tidy(scheduler.store)
    serial, parallel = (Traces.of(scheduler) for scheduler in pair)
    return serial, parallel


@linux
def test_a_suite_gives_the_same_in_series_and_in_parallel(undisturbed: tuple[Traces, Traces]) -> None:
    serial, parallel = undisturbed
    assert_same(serial, parallel)
    assert len(serial.weights) == 1 + 1 + 3 + 1
    assert len(serial.cells) == 3 + 1
    assert {cell.status for cell in serial.cells} == {Status.DONE}


@linux
def test_a_run_that_is_interrupted_again_and_again_ends_as_if_nothing_had_been(
    undisturbed: tuple[Traces, Traces], schedulers: list[SchedulerProcess], tmp_path: Path
) -> None:
    """Two workers die, then the scheduler in the midst of a stage; the next one gets Ctrl-C; the third is left alone."""
    scheduler = SchedulerProcess(tmp_path)
    schedulers.append(scheduler)

    scheduler.start()
    scheduler.strike(signal.SIGKILL)
    scheduler.strike(signal.SIGTERM)
    scheduler.end_in_the_midst(signal.SIGKILL, stages=1)
    finished = scheduler.tokens()

    scheduler.start()
    until(lambda: scheduler.over() or (len(scheduler.tokens()) > 2 and bool(scheduler.workers())))
    scheduler.ctrl_c(group=True)
    finished |= scheduler.tokens()
    assert 2 < len(finished) < 14

    scheduler.start().ended(0)
    assert_same(Traces.of(scheduler), undisturbed[0])
    assert_tidy(scheduler.store)
    assert scheduler.tokens().items() >= finished.items()  # nothing was done twice


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_workers_die_with_their_scheduler(
    schedulers: list[SchedulerProcess], tmp_path: Path, number: signal.Signals
) -> None:
    """At once: left alone, these would train for hours."""
    scheduler = SchedulerProcess(tmp_path, suite=HOURS)
    schedulers.append(scheduler)
    scheduler.start()
    until(lambda: scheduler.over() or len(scheduler.under_way()) == 2)
    assert len(scheduler.workers()) == 2
    os.kill(scheduler.pid, number)
    until(lambda: scheduler.over() and not scheduler.alive(), 10)
    assert len(scheduler.under_way()) == 2


@linux
@pytest.mark.parametrize("group", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_lets_workers_stop_at_a_checkpoint(
    schedulers: list[SchedulerProcess], tmp_path: Path, group: bool
) -> None:
    """Whether all processes of the run get it, as from a terminal, or the scheduler alone."""
    scheduler = SchedulerProcess(
        tmp_path, checkpoint_seconds=3600, suite=HOURS
    )  # it is the stop that makes the checkpoint
    schedulers.append(scheduler)
    scheduler.start()
    progress = scheduler.folder / "store" / "work"
    until(lambda: scheduler.over() or len(list(progress.glob("*/progress.json"))) == 2)
    assert scheduler.under_way() == []
    scheduler.ctrl_c(group=group)
    assert len(scheduler.under_way()) == 2
    for name in ("claims", "tmp"):
        assert os.listdir(scheduler.store.root / name) == [], name


@linux
@pytest.mark.slow
def test_two_schedulers_on_one_store_share_the_stages_and_their_results(
    undisturbed: tuple[Traces, Traces], schedulers: list[SchedulerProcess], tmp_path: Path
) -> None:
    pair = [SchedulerProcess(tmp_path, jobs=1, out=out).start() for out in ("one", "two")]
    schedulers += pair
    for scheduler in pair:
        scheduler.ended(0)
    for scheduler in pair:
        assert_same(Traces.of(scheduler), undisturbed[0])
    assert_tidy(scheduler.store)


@linux
@pytest.mark.slow
def test_chaos_changes_nothing(schedulers: list[SchedulerProcess], tmp_path: Path) -> None:
    """Random processes of a run are killed at random moments; the scheduler is started again; then it is left alone."""
    suite = (
        SUITE.replace("seeds = 1", "seeds = 2")
        .replace("epochs = 12", "epochs = 60")
        .replace("epochs = 5", "epochs = 30")
    )
    quiet = SchedulerProcess(tmp_path / "quiet", checkpoint_seconds=30, suite=suite)
    schedulers.append(quiet)
    quiet.start().ended(0)
    seed = int(os.environ.get("KDBENCH_CHAOS_SEED") or secrets.randbelow(10**6))
    print(f"KDBENCH_CHAOS_SEED={seed}")
    chance = random.Random(seed)
    scheduler = SchedulerProcess(tmp_path / "chaos", suite=suite)
    schedulers.append(scheduler)
    finished: dict[str, str] = {}
    struck = 0
    scheduler.start()
    while struck < STRIKES:
        time.sleep(chance.uniform(0.1, 0.9))
        if scheduler.over():
            if scheduler.outcome() == 0:
                break
            scheduler.start()
        if victims := chance.choices((scheduler.workers(), scheduler.children(), [scheduler.pid]), (70, 15, 15))[0]:
            struck += send(chance.choice(sorted(victims)), chance.choice(DEADLY))
        assert scheduler.tokens().items() >= finished.items()
        finished = scheduler.tokens()
    while scheduler.outcome() != 0:
        scheduler.start()
    print(f"{struck} processes were killed")
    assert struck
    assert_same(Traces.of(scheduler), Traces.of(quiet))
    assert scheduler.tokens().items() >= finished.items()
    for name in ("claims", "failures"):
        assert os.listdir(scheduler.store.root / name) == [], name
