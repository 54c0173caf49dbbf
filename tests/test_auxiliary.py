"""Runs with auxiliary models: records, costs, failures and second runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

from auxiliary_runs import MISINFORMATION, REDIRECTION, WITH_AUXILIARY

from kdbench.board.report import write_report
from kdbench.records import Status
from kdbench.suites.suite import Suite
from runs import FinishedRun, Json, RecordedProgress, numbers, run

DIVERGES: Json = {f"defense.{REDIRECTION}.recipe.lr": 1e30}


def test_a_run_with_auxiliary_models_ends_well(auxiliary_run: FinishedRun) -> None:
    assert auxiliary_run.progress_display.problems == {}
    assert {one.status for one in auxiliary_run.cells.values()} == {Status.DONE}
    assert sorted(title for title in auxiliary_run.progress_display.titles if title.startswith("auxiliary")) == [
        f"auxiliary model of {MISINFORMATION}, seed 0",
        f"auxiliary model of {REDIRECTION}, seed 0",
    ]


def test_the_record_of_a_cell_has_its_stage_and_what_that_cost(auxiliary_run: FinishedRun) -> None:
    for name, one in auxiliary_run.cells.items():
        auxiliary_seconds = name.startswith((REDIRECTION, MISINFORMATION))
        assert ("auxiliary" in one.keys) == ("auxiliary" in one.seconds) == auxiliary_seconds, name
        if auxiliary_seconds:
            assert one.seconds["auxiliary"] == round(auxiliary_run.store.manifest(one.keys["auxiliary"]).seconds, 3)


def test_the_report_says_what_auxiliary_models_cost(auxiliary_run: FinishedRun, tmp_path: Path) -> None:
    shutil.copy(auxiliary_run.folder / "out" / "cells.jsonl", tmp_path)
    cost = write_report(tmp_path).read_text(encoding="utf-8").partition("## Cost")[2].splitlines()
    seconds = {one.defense.name: one.seconds for one in auxiliary_run.cells.values() if one.defense}
    trained = [line for line in cost if line.startswith((f"| {REDIRECTION} |", f"| {MISINFORMATION} |"))]
    assert "| Defense | Mean seconds to harden | Mean seconds of its auxiliary model |" in cost
    misinformation, redirection = seconds[MISINFORMATION], seconds[REDIRECTION]
    assert trained == [
        f"| {MISINFORMATION} | {misinformation['harden']:,.2f} | {misinformation['auxiliary']:,.2f} |",
        f"| {REDIRECTION} | – | {redirection['auxiliary']:,.2f} |",
    ]
    total = misinformation["auxiliary"] + redirection["auxiliary"]
    assert f"| auxiliary | 2 | {total:,.1f} | {total / 2:,.2f} |" in cost


def test_a_second_run_makes_no_auxiliary_model_again(
    auxiliary_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    again = run(
        tiny({**WITH_AUXILIARY, "attacks": ["kd"]}), tmp_path, progress_display, store=auxiliary_run.folder / "store"
    )
    assert progress_display.titles == []
    assert numbers(again).items() <= numbers(auxiliary_run.cells).items()


def test_an_auxiliary_model_that_fails_costs_the_cells_that_need_it_and_they_say_why(
    auxiliary_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    cells = run(tiny(WITH_AUXILIARY | DIVERGES), auxiliary_run.copy(tmp_path), progress_display)
    reason, whose = "training diverged: the loss was not finite in epoch 0", REDIRECTION
    assert progress_display.problems == {f"auxiliary model of {whose}, seed 0": reason}
    attackers = ("hard-label", "kd", "partial-kd")
    assert progress_display.lost == {
        f"evaluate {whose}, seed 0",
        *(f"{attacker} from {whose}, seed 0" for attacker in attackers),
        *(f"evaluate {attacker} on {whose}, seed 0" for attacker in attackers),
    }
    for name, one in cells.items():
        if name.startswith(whose):
            assert (one.status, one.reason, one.metrics) == (Status.FAILED, reason, {}), name
        else:
            assert numbers({name: one}) == numbers({name: auxiliary_run.cells[name]})


def test_under_low_precision_a_run_with_auxiliary_models_ends_well_too(
    tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """`fit` asks its teacher under autocast, in which torch's forward-mode derivatives of a convolution fail."""
    changes = {
        "precision": "bf16",
        "defenses": ["none", REDIRECTION, MISINFORMATION],
        "attacks": ["kd"],
        "baselines": [],
    }
    progress_display = RecordedProgress()
    run(tiny(WITH_AUXILIARY | changes), tmp_path, progress_display)
    assert progress_display.problems == {}
