"""A run of a whole suite: stages are run once and kept; what breaks costs only what builds on it."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors import safe_open

from kdbench.api import KdbenchError
from kdbench.engine import scheduler
from kdbench.engine.models import WEIGHTS
from kdbench.engine.plan import Plan, Stage
from kdbench.engine.scheduler import LOST_ATTEMPTS
from kdbench.engine.specs import read_spec
from kdbench.engine.store import Store
from kdbench.records import Status, read
from kdbench.suites.suite import Suite
from runs import (
    DIVERGES,
    ON_NASTY,
    ONE_CELL,
    ONE_CELL_STAGES,
    FinishedRun,
    RecordedProgress,
    digests,
    numbers,
    run,
    until,
)


def test_a_finished_run_has_all_its_cells_done(golden: FinishedRun, plan: Callable[..., Plan]) -> None:
    assert set(golden.cells) == {c.name for c in plan().cells}
    assert {c.status for c in golden.cells.values()} == {Status.DONE}
    assert golden.progress_display.begun == [(1, 0), (31, 1)]
    assert sorted(golden.progress_display.titles) == sorted(stage.title for stage in plan().stages.values())
    assert golden.progress_display.closed == 2
    for name, found in golden.cells.items():
        expected = {"student_acc", "student_val_acc", "queries"}
        expected |= set() if name.startswith("baseline") else {"victim_acc", "victim_val_acc", "fidelity"}
        assert set(found.metrics) >= expected, name


def test_no_more_workers_run_at_once_than_jobs(golden: FinishedRun) -> None:
    assert golden.progress_display.most == 2


def test_no_stage_starts_before_what_it_builds_on_is_there(golden: FinishedRun) -> None:
    ended: set[str] = set()
    for stage in golden.progress_display.finished:
        assert set(stage.inputs) <= ended
        ended.add(stage.key)


def test_a_finished_run_leaves_nothing_but_stages_and_what_they_mean(golden: FinishedRun) -> None:
    for name in ("claims", "tmp", "work", "failures"):
        assert os.listdir(golden.store.root / name) == [], name
    assert len(os.listdir(golden.store.root / "specs")) == len(golden.store.finished()) == 32


def test_every_manifest_says_what_when_and_by_what(golden: FinishedRun) -> None:
    for stage in golden.progress_display.finished:
        manifest = golden.store.manifest(stage.key)
        assert (manifest.key, manifest.kind, manifest.title) == (stage.key, stage.kind, stage.title)
        assert read_spec({"kind": manifest.kind, "spec": manifest.spec}) == stage.spec
        assert manifest.seconds > 0
        assert {"kdbench", "torch", "python", "cpu"} <= set(manifest.machine)


def test_no_file_in_a_store_is_a_pickle(golden: FinishedRun) -> None:
    for path in (path for path in golden.store.root.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        elif path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict)
        else:
            assert path.suffix == ".log", path


def test_a_matrix_that_is_cached_runs_no_stage_and_gives_the_same_results(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    again = run(tiny(), tmp_path, progress_display, store=golden.folder / "store")
    assert progress_display.titles == []
    assert progress_display.begun == [(0, 32)]
    for name in ("cells.jsonl", "predictions.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (golden.folder / "out" / name).read_bytes()
    assert again == golden.cells


def test_force_runs_everything_again_but_the_data(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    golden.copy(tmp_path)
    progress_display = RecordedProgress()
    again = run(tiny(ONE_CELL), tmp_path, progress_display, force=True)
    assert sorted(progress_display.titles) == sorted(ONE_CELL_STAGES[1:])
    assert numbers(again) == {name: value for name, value in numbers(golden.cells).items() if name in again}


def test_a_stage_that_fails_costs_only_what_builds_on_it(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    cells = run(tiny(DIVERGES), golden.copy(tmp_path), progress_display)
    reason = "training diverged: the loss was not finite in epoch 0"
    assert progress_display.titles == ["harden by nasty, seed 0"]
    assert progress_display.problems == {"harden by nasty, seed 0": reason}
    assert progress_display.lost == ON_NASTY
    for name, found in cells.items():
        if name.startswith("nasty--"):
            assert (found.status, found.reason, found.metrics) == (Status.FAILED, reason, {})
        else:
            assert found.metrics == golden.cells[name].metrics
            assert found.status is Status.DONE


def test_a_failure_is_never_cached(golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path) -> None:
    golden.copy(tmp_path)
    store, cells = Store(tmp_path / "store"), []
    for _ in range(2):
        progress_display = RecordedProgress()
        cells.append(run(tiny(DIVERGES), tmp_path, progress_display))
        assert progress_display.titles == ["harden by nasty, seed 0"]
        assert store.finished() == golden.store.finished()
    assert numbers(cells[0]) == numbers(cells[1])


def test_a_refused_query_is_the_reason_of_the_cells_that_asked(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    cells = run(tiny({"scenario.budget": 100}), golden.copy(tmp_path))
    for name, found in cells.items():
        if name.startswith("baseline") or "partial" in name:  # 2 epochs x 48 images are inside the budget
            assert found.status is Status.DONE, name
        else:
            assert found.reason == "asked for 32 answers with 4 of 100 left"
            assert found.status is Status.FAILED


def test_an_error_that_nobody_foresaw_is_reported_with_its_traceback(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    store = Store(golden.copy(tmp_path) / "store")
    [train] = [key for key in store.finished() if key.startswith("train/")]
    (store.path(train) / WEIGHTS).unlink()
    cells = run(tiny(ONE_CELL | {"attack.kd.temperature": 3.0}), tmp_path)
    [found] = cells.values()
    assert found.status is Status.FAILED
    assert found.reason.startswith("FileNotFoundError: ")
    failure = store.failure(found.keys["steal"])
    assert failure is not None
    assert "Traceback (most recent call last)" in failure.traceback
    assert "load_weights" in failure.traceback


def test_a_cell_that_is_skipped_says_why_and_runs_nothing(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    cells = run(tiny({"attacks": ["deep-inversion"]}), tmp_path, progress_display, store=golden.folder / "store")
    skipped = {name: c.reason for name, c in cells.items() if c.status is Status.SKIPPED}
    reason = "'deep-inversion' needs weights; the suite grants probs"
    assert skipped == {f"{defense}--deep-inversion--mini-8--seed0": reason for defense in ("none", "nasty", "stingy")}
    assert progress_display.titles == []


def test_results_of_another_matrix_are_not_mixed_in(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    store = golden.folder / "store"
    run(tiny(), tmp_path, store=store)
    with pytest.raises(KdbenchError, match=r"holds 12 cells of another matrix .* Choose another folder with --out"):
        run(tiny(ONE_CELL), tmp_path, store=store)
    assert len(read(tmp_path / "out")) == 13


@dataclass
class Killer(RecordedProgress):
    """Kills the worker of a stage as soon as it is running, so many times."""

    store: Store | None = None
    victim: str = ""
    times: int = 1
    killed: int = 0

    def tick(self, running: dict[str, tuple[Stage, float, str]]) -> None:
        assert self.store
        for key, (stage, _, _) in running.items():
            if stage.title == self.victim and self.killed < self.times:
                claim = self.store.root / "claims" / key.replace("/", "-")
                until(lambda claim=claim: claim.exists() and claim.stat().st_size > 0)  # type: ignore[misc]
                [worker] = multiprocessing.active_children()
                worker.kill()
                worker.join()
                assert not self.store.has(key)
                self.killed += 1


@pytest.mark.parametrize("victim", ONE_CELL_STAGES[1:4])
def test_a_worker_that_is_killed_is_replaced_and_the_result_is_the_same(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path, victim: str
) -> None:
    progress_display = Killer(store=Store(tmp_path / "store"), victim=victim, times=LOST_ATTEMPTS - 1)
    cells = run(tiny(ONE_CELL), tmp_path, progress_display, jobs=1)
    assert progress_display.killed == LOST_ATTEMPTS - 1
    assert progress_display.titles.count(victim) == LOST_ATTEMPTS
    assert progress_display.problems == {}
    assert numbers(cells) == {name: numbers(golden.cells)[name] for name in cells}
    assert digests(Store(tmp_path / "store")).items() <= digests(golden.store).items()
    assert os.listdir(tmp_path / "store" / "claims") == []


def test_a_worker_that_always_dies_becomes_a_failed_stage_that_names_its_log(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    progress_display = Killer(store=store, victim="kd from none, seed 0", times=100)
    [found] = run(tiny(ONE_CELL), tmp_path, progress_display, jobs=1).values()
    assert progress_display.killed == LOST_ATTEMPTS == 3
    log = store.log_path(found.keys["steal"])
    assert found.status is Status.FAILED
    assert found.reason == f"the worker was killed by signal 9 (out of memory?), 3 times; its log is {log}"
    assert log.is_file()
    assert progress_display.lost == {"evaluate kd on none, seed 0"}
    second = RecordedProgress()
    [again] = run(tiny(ONE_CELL), tmp_path, second, jobs=1).values()  # not cached: now that nobody kills it, it is done
    assert set(second.titles) == {"kd from none, seed 0", "evaluate kd on none, seed 0"}
    assert again.metrics == golden.cells[again.name].metrics


@dataclass
class Neighbour(RecordedProgress):
    """Another run, which holds the claim on the victim and publishes it when this run has asked for it five times."""

    store: Store | None = None
    other: Store | None = None
    claims: ExitStack = field(default_factory=ExitStack)

    def started(self, stage: Stage) -> None:
        super().started(stage)
        assert self.store
        assert self.other
        asked = self.titles.count(stage.title)
        if stage.kind == "train" and asked == 1:
            assert self.claims.enter_context(self.store.claim(stage.key)) is not None
        elif stage.kind == "train" and asked == 5:
            shutil.copytree(self.other.path(stage.key), built := self.store.scratch(stage.key), dirs_exist_ok=True)
            built.rename(self.store.path(stage.key))
            self.claims.close()


def test_a_claim_of_another_run_is_waited_for_and_its_result_taken(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is refused: to be busy is no attempt that was lost."""
    monkeypatch.setattr(scheduler, "BUSY_SECONDS", 0.05)
    store = Store(tmp_path / "store")
    progress_display = Neighbour(store=store, other=golden.store)
    [found] = run(tiny(ONE_CELL), tmp_path, progress_display).values()
    assert progress_display.titles.count("train the victim, seed 0") == 5 > LOST_ATTEMPTS
    assert progress_display.problems == {}
    assert store.manifest(found.keys["train"]).token == golden.store.manifest(found.keys["train"]).token
    assert found.metrics == golden.cells[found.name].metrics
