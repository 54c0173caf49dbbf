"""The planner and the runner beside the work, for 10,000 cells: times as ratios within one run, memory in bytes a cell.

pytest benchmarks/speed/test_planner.py --benchmark-enable -s      (about two minutes)

The goals in seconds (a plan in 1 s, 5 ms for a cached cell) are printed and recorded, not asserted: machines differ.
"""

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import take_turns

from kdbench import records
from kdbench.engine.executors.protocol import Handle, Report
from kdbench.engine.manifest import Manifest
from kdbench.engine.numerics import Numerics
from kdbench.engine.orders import WorkerOptions
from kdbench.engine.plan import Plan, Stage
from kdbench.engine.planner import data_stage, make_plan
from kdbench.engine.scheduler import ProgressDisplay, run_stages
from kdbench.engine.stages import PREDICTIONS
from kdbench.engine.store import MANIFEST, Store, write_json
from kdbench.engine.tensors import load_tensors, save_tensors
from kdbench.engine.workspace import TENSORS
from kdbench.game.fields import plain
from kdbench.metrics import METRICS
from kdbench.runs.request import Options
from kdbench.runs.session import Session
from kdbench.suites import reader as suites
from kdbench.suites.suite import Suite

SEEDS = 345  # of the default suite: 10,005 cells
VARIANTS = 57  # of one defense and of one attack, with 3 seeds: 9,921 cells
IMAGES = 600  # in the test set
LIMIT = 2048  # bytes a cell


def many_seeds() -> Suite:
    return suites.load("digits", {"seeds": SEEDS})


def many_variants() -> Suite:
    defenses, attacks = [f"nasty-{i}" for i in range(VARIANTS)], [f"kd-{i}" for i in range(VARIANTS)]
    changes: dict[str, Any] = {"seeds": 3, "defenses": ["none", *defenses], "attacks": attacks}
    changes["baselines"] = ["cross-entropy"]
    for i, (defense, attack) in enumerate(zip(defenses, attacks, strict=True)):
        changes[f"defense.{defense}"] = {"method": "nasty", "omega": 0.01 * (i + 1)}
        changes[f"attack.{attack}"] = {"method": "kd", "temperature": 1.0 + i}
    return suites.load("digits", changes)


SHAPES = [many_seeds, many_variants]


def plan_of(suite: Suite) -> Plan:
    return make_plan(suite, Numerics(), "content")


def hashed(plan: Plan) -> list[str]:
    """What a plan cannot do without, if done for each stage alone: canonical JSON and SHA-256 of its specification."""
    texts = (json.dumps(plain(stage.spec), sort_keys=True, separators=(",", ":")) for stage in plan.stages.values())
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


@pytest.mark.parametrize("shape", SHAPES)
def test_planning_costs_no_more_than_writing_the_plan_down(
    benchmark: BenchmarkFixture, shape: Callable[[], Suite]
) -> None:
    """At most 2 times canonical JSON and SHA-256 of the same specifications."""
    suite = shape()
    plan = plan_of(suite)
    times = take_turns({"plan": lambda: plan_of(suite), "hash": lambda: hashed(plan)}, 3)
    size = {"cells": len(plan.cells), "stages": len(plan.stages)}
    record(benchmark, size | {f"{name}_seconds": round(seconds, 3) for name, seconds in times.items()})
    benchmark.pedantic(lambda: plan_of(suite), rounds=1)
    assert times["plan"] <= 2 * times["hash"]


class Stopping:
    """An executor that ends the run when it is given the first stages."""

    name = "stopping"

    def slots(self) -> int:
        return 1

    def submit(self, jobs: Sequence[tuple[str, ...]]) -> list[Handle]:
        raise KeyboardInterrupt

    def poll(self, handles: Collection[Handle]) -> dict[Handle, Report]:
        return {}

    def wait(self, seconds: float) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_under_way_takes_little_memory_a_cell(
    benchmark: BenchmarkFixture, shape: Callable[[], Suite], tmp_path: Path
) -> None:
    """All of it still to do: the plan, and what the scheduler knows of each stage, with its share of the stages."""
    suite, store = shape(), Store(tmp_path)
    plan_of(suite)  # what is imported and cached once is no cell's

    def start() -> int:
        plan = plan_of(suite)
        with pytest.raises(KeyboardInterrupt):
            run_stages(plan.stages, store, Stopping(), ProgressDisplay(), WorkerOptions("data"))
        return len(plan.cells)

    check_memory(benchmark, start)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which each stage of `many_seeds` is done, with manifests as long as real ones."""
    root, suite = tmp_path_factory.mktemp("finished"), many_seeds()
    Store(root)
    data = data_stage(suite.dataset)
    finish(root, data, content="content")
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    save_tensors({"train.x": torch.zeros(1, 1, 8, 8), "test.y": labels}, root / data.key / TENSORS)
    save_tensors({"test": labels}, root / PREDICTIONS)
    for key, stage in plan_of(suite).stages.items():
        if key != data.key:
            finish(root, stage)
    return root


def finish(root: Path, stage: Stage, content: str = "") -> None:
    of_kind = METRICS if stage.kind == "evaluate" else ("queries",) if stage.kind == "steal" else ()
    manifest = Manifest(
        stage.kind,
        stage.title,
        plain(stage.spec),
        dict.fromkeys(of_kind, 0.123456789),
        {"classes": 10.0},
        seconds=1.0,
        machine=dict.fromkeys("abcdefgh", "1.2.3"),
        content=content,
        key=stage.key,
        files={"weights.safetensors": "0" * 64},
        token="0" * 16,
    )
    (root / stage.key).mkdir()
    write_json(root / stage.key / MANIFEST, manifest)
    if stage.kind == "evaluate":
        os.link(root / PREDICTIONS, root / stage.key / PREDICTIONS)


def session(root: Path, out: Path) -> Session:
    return Session(many_seeds(), Options(root, out, device="cpu"), ProgressDisplay())


def bare(root: Path, out: Path) -> None:
    """What the files cost: each manifest read once, each record read and written once."""
    for path in root.glob(f"*/*/{MANIFEST}"):
        json.loads(path.read_text())
    for path in root.glob(f"evaluate/*/{PREDICTIONS}"):
        load_tensors(path)
    lines = (out / records.FILE).read_text().splitlines()
    (out / records.FILE).write_text("".join(json.dumps(json.loads(line)) + "\n" for line in lines))


def test_a_cached_cell_costs_little_more_than_its_files(
    benchmark: BenchmarkFixture, finished: Path, tmp_path: Path
) -> None:
    """At most 2 times reading the manifests and predictions and reading and writing the records; planning is part of it."""
    cells = session(finished, tmp_path).run().total()
    times = take_turns({"run": session(finished, tmp_path).run, "bare": lambda: bare(finished, tmp_path)}, 3)
    record(benchmark, {f"{name}_ms_a_cell": round(1000 * t / cells, 3) for name, t in times.items()})
    benchmark.pedantic(session(finished, tmp_path).run, rounds=1)
    assert times["run"] <= 2 * times["bare"]


def test_a_cached_run_takes_little_memory_a_cell(benchmark: BenchmarkFixture, finished: Path, tmp_path: Path) -> None:
    plan_of(many_seeds())
    run = session(finished, tmp_path)
    check_memory(benchmark, lambda: run.run().total())


def check_memory(benchmark: BenchmarkFixture, act: Callable[[], int]) -> None:
    """Bytes that Python holds at most during `act`, by the number of cells that it returns."""
    tracemalloc.start()
    cells = benchmark.pedantic(act, rounds=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    record(benchmark, {"cells": cells, "bytes_a_cell": round(peak / cells)})
    assert peak < LIMIT * cells


def record(benchmark: BenchmarkFixture, numbers: dict[str, float]) -> None:
    benchmark.extra_info.update(numbers)
    print(numbers)
