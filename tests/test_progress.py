"""Progress of a run: what is shown while it runs."""

import io
import re
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from kdbench.engine.plan import Plan, Stage
from kdbench.engine.scheduler import ProgressDisplay
from kdbench.engine.store import MANIFEST
from kdbench.runs.progress import LiveProgress, PlainProgress, duration
from runs import ONE_CELL, Clock, FinishedRun


@pytest.fixture
def watched(plan: Callable[..., Plan]) -> list[Stage]:
    return list(plan(ONE_CELL).stages.values())


def tell(progress_display: ProgressDisplay, stages: Sequence[Stage]) -> None:
    """A run of five stages: two end, one fails and costs two."""
    first, second, third, *above = stages
    progress_display.begin({stage.key: stage for stage in stages}, 7)
    for stage in (first, second, third):
        progress_display.started(stage)
        progress_display.tick({stage.key: (stage, 0.5, "epoch 1/2")})
        progress_display.ended(stage, 1.5, "it [broke]" if stage is third else "")
    progress_display.dropped(above)
    progress_display.close()


def test_a_run_in_plain_lines_says_what_ended_and_what_failed(watched: list[Stage]) -> None:
    out = io.StringIO()
    tell(PlainProgress(Console(file=out)), watched)
    lines = out.getvalue().splitlines()
    assert lines[0] == "5 stages to do, 7 finished before"
    assert lines[1].startswith("[1/5] read blobs: 1.5 s; ")
    assert lines[2].startswith("[2/5] train the victim, seed 0: 1.5 s; ")
    assert lines[3].startswith("[3/5] kd from none, seed 0: FAILED: it [broke]; ")
    assert len(lines) == 4


def test_plain_lines_say_now_and_then_what_runs(watched: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), Clock()
    monkeypatch.setattr("kdbench.runs.progress.time", clock)
    progress_display = PlainProgress(Console(file=out))
    running = {watched[1].key: (watched[1], 0.5, "epoch 1/2")}
    for _ in range(25):
        clock.now += 1
        progress_display.tick(running)
        progress_display.tick({})
    assert out.getvalue().splitlines() == ["running: train the victim, seed 0 50% epoch 1/2"] * 2


def test_a_live_display_shows_what_runs_and_keeps_failures_on_the_screen(watched: list[Stage]) -> None:
    out = io.StringIO()
    progress_display = LiveProgress(Console(file=out, force_terminal=True, width=200))
    tell(progress_display, watched[:1] * 3)  # the data stage comes first, in a run of its own
    tell(progress_display, watched)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "FAILED kd from none, seed 0: it [broke]" in text
    assert "train the victim, seed 0  50%  epoch 1/2" in text
    assert "2/5" in text


def test_a_display_with_nothing_to_do_shows_nothing(watched: list[Stage]) -> None:
    out = io.StringIO()
    for progress_display in (LiveProgress(Console(file=out, force_terminal=True)), PlainProgress(Console(file=out))):
        progress_display.begin({}, 32)
        progress_display.tick({})
        progress_display.close()
    assert out.getvalue() == ""


def test_time_left_is_the_estimate_of_the_rest_at_the_throughput_so_far(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 of 13 attack runs of 10 s each, two at a time, took 20 s: the other 9 take 45 s."""
    out, clock = io.StringIO(), Clock()
    monkeypatch.setattr("kdbench.runs.progress.time", clock)
    attack_runs = {key: stage for key, stage in plan().stages.items() if stage.kind == "steal"}
    progress_display = PlainProgress(Console(file=out))
    progress_display.begin(attack_runs, 0)
    progress_display._tally.since = clock.now
    clock.now += 20
    for stage in list(attack_runs.values())[:4]:
        progress_display.ended(stage, 10.0, "")
    assert out.getvalue().splitlines()[-1].endswith("about 45 s left")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (600, "10 min"), (5400, "1.5 h"), (86400, "24.0 h")],
)
def test_durations_are_written_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_manifests_are_the_only_json_of_a_stage(golden: FinishedRun) -> None:
    for key in golden.store.finished():
        assert [path.name for path in golden.store.path(key).glob("*.json")] == [MANIFEST]
