"""The time table of a run: a line a stage, totals by kind, and the overhead beyond the stages."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdbench.engine.manifest import Manifest, Throughput
from kdbench.engine.plan import Plan, Stage
from kdbench.engine.scheduler import Outcome
from kdbench.engine.store import Store
from kdbench.runs import command
from kdbench.runs.timing import HEAD, timing_table
from runs import ONE_CELL, FinishedRun

MEASURED = Throughput(images=1000, seconds=4.0, compared_seconds=2.0, bare_seconds=1.5)


@pytest.fixture
def done(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., tuple[Store, list[Stage]]]:
    """Makes a store in which the five stages of the smallest run are finished, with manifests that say this."""

    def make(seconds: float, throughputs: list[Throughput]) -> tuple[Store, list[Stage]]:
        store, stages = Store(tmp_path), list(plan(ONE_CELL).stages.values())
        for stage, throughput in zip(stages, throughputs, strict=True):
            manifest = Manifest(stage.kind, seconds=seconds, throughput=throughput)
            store.publish(stage.key, store.scratch(stage.key), manifest)
        return store, stages

    return make


def rows(text: str) -> dict[str, list[str]]:
    """The columns after kind and stage, by kind and stage."""
    table = {}
    for line in text.splitlines()[1:-1]:
        kind, words = line.split(maxsplit=1)
        *title, seconds, speed, share, overhead = words.split()
        table[f"{kind}: {' '.join(title)}"] = [seconds, speed, share, overhead]
    return table


def test_a_line_says_seconds_speed_share_of_the_bare_loop_and_overhead(done: Callable[..., Any]) -> None:
    """By hand: 1000 images in 4 s; half of these were compared, with a loop of 1.5 s; the scheduler waited half a second."""
    alone = replace(MEASURED, images=500, compared_seconds=0.0, bare_seconds=None)
    store, stages = done(5.0, [Throughput(), MEASURED, alone, Throughput(), Throughput()])
    outcome = Outcome(seconds={stages[1].key: 5.5, stages[2].key: 5.25})
    text = timing_table(stages, store, outcome, 12.0)
    assert text.splitlines()[0].split() == " ".join(HEAD).split()
    assert rows(text) == {
        "data: read blobs": ["5.00", "–", "–", "–"],
        "train: train the victim, seed 0": ["5.00", "250", "75%", "0.50"],
        "steal: kd from none, seed 0": ["5.00", "125", "–", "0.25"],
        "evaluate: evaluate kd on none, seed 0": ["5.00", "–", "–", "–"],
        "evaluate: evaluate none, seed 0": ["5.00", "–", "–", "–"],
        "data: all 1": ["5.00", "–", "–", "–"],
        "train: all 1": ["5.00", "250", "75%", "0.50"],
        "steal: all 1": ["5.00", "125", "–", "0.25"],
        "evaluate: all 2": ["10.00", "–", "–", "–"],
    }
    assert text.splitlines()[-1] == (
        "12.0 s on the wall; 2 stages run now, 10.0 s in the workers (train 50%, steal 50%)"
    )


def test_totals_add_up_over_the_stages_of_a_kind(done: Callable[..., Any]) -> None:
    store, stages = done(5.0, [replace(MEASURED, bare_seconds=0.5 + n / 4) for n in range(5)])
    outcome = Outcome(seconds={stages[3].key: 6.0, stages[4].key: 5.5})
    # evaluations: bare loops of 1.25 and 1.5 s, compared with 2 s each
    assert rows(timing_table(stages, store, outcome, 1.0))["evaluate: all 2"] == ["10.00", "250", "69%", "1.50"]


def test_a_stage_that_trained_nothing_and_one_that_failed_are_no_obstacle(done: Callable[..., Any]) -> None:
    store, stages = done(1.0, [Throughput()] * 5)
    store.discard(stages[2].key)
    text = timing_table(stages, store, Outcome(problems={stages[2].key: "it broke"}), 0.5)
    assert "steal" not in text
    assert rows(text)["train: train the victim, seed 0"] == ["1.00", "–", "–", "–"]
    assert text.splitlines()[-1] == "0.5 s on the wall; 0 stages run now, 0.0 s in the workers"


def test_a_profiled_run_measures_bare_loops_and_prints_a_line_a_stage(
    golden: FinishedRun, tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was finished before is shown as it was recorded: without a bare loop."""
    request = command.Request(
        store=golden.copy(tmp_path) / "store",
        out=tmp_path / "out",
        device="cpu",
        jobs=2,
        quiet=True,
        profile=True,
        defense=["none"],
        attack=["kd"],
        changes=["attack.kd.temperature=3"],
    )
    assert command.run(tiny_file, request) == 0
    said = capsys.readouterr().out
    table = rows(said[said.index("kind ") :])
    cached, fresh = table["train: train the victim, seed 0"], table["steal: kd from none, seed 0"]
    assert cached[2:] == ["–", "–"]
    assert fresh[2].endswith("%")
    assert float(fresh[3]) > 0
    assert float(fresh[1]) > 0
    assert said.splitlines()[-1].partition("; ")[2].startswith("2 stages run now")
