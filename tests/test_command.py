"""The command behind the command line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.api import KdbenchError
from kdbench.engine.json_files import write_json
from kdbench.engine.store import Store
from kdbench.records import read
from kdbench.runs import command, network_figures
from kdbench.runs.session import Session
from kdbench.runs.status import status
from kdbench.suites.suite import Suite
from runs import DIVERGES, ON_NASTY, TINY, FinishedRun, Json, RecordedProgress, options


def request(folder: Path, **changes: Any) -> command.Request:
    values: Json = {"store": folder / "store", "out": folder / "out", "device": "cpu", "jobs": 2, "quiet": True}
    return command.Request(**values | changes)


def test_a_run_whose_cells_are_done_ends_with_0(
    golden: FinishedRun, tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(tiny_file, request(golden.copy(tmp_path), attack=["kd"], defense=["nasty"])) == 0
    printed = capsys.readouterr().out
    assert "nasty" in printed
    assert "failed" not in printed
    assert {c.defense.name for c in read(tmp_path / "out") if c.defense} == {"none", "nasty"}


def test_a_run_in_which_cells_fail_ends_with_1_and_says_how_many_and_why(
    golden: FinishedRun, tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"{path}={value}" for path, value in DIVERGES.items()]
    assert command.run(tiny_file, request(golden.copy(tmp_path), changes=changes)) == 1
    assert "3 cells failed: training diverged: the loss was not finite in epoch 0" in capsys.readouterr().out
    said = status(tmp_path / "out")
    assert "cells: 10 done, 3 failed" in said
    assert "failed: nasty--kd--mini-8--seed0: training diverged" in said


def test_a_dry_run_prints_the_plan_and_runs_nothing(
    golden: FinishedRun, tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden.copy(tmp_path)
    assert command.run(tiny_file, request(tmp_path, dry_run=True, changes=["defense.nasty.omega=0.5"])) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^to do +harden +harden by nasty, seed 0$", printed, re.MULTILINE)
    assert re.search(r"^cached +train +train the victim, seed 0$", printed, re.MULTILINE)
    assert len(re.findall(r"^to do ", printed, re.MULTILINE)) == 1 + len(ON_NASTY)
    assert Store(tmp_path / "store").finished() == golden.store.finished()
    assert not (tmp_path / "out").exists()


NUMBER = """
[[reported]]
defense = "nasty"
attack = "kd"
accuracy = 0.5
source = "a table"
evidence = "paper"
"""


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_run_says_which_change_left_reported_numbers_out(
    dry_run: bool, golden: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY + NUMBER)
    said = "1 of 1 reported numbers are not shown: they are not about a suite with another attack.kd.alpha."
    for changes, lines in (["attack.kd.alpha=0.8"], [said]), ([], []):
        asked = request(golden.copy(tmp_path / str(len(changes))), dry_run=dry_run, changes=changes, defense=["nasty"])
        assert command.run(str(tmp_path / "tiny.toml"), asked) == 0
        printed = capsys.readouterr().out
        assert [line for line in printed.splitlines() if "reported numbers are" in line] == lines
        assert ("Beside reported numbers" in printed) == (not changes and not dry_run)


def test_the_status_of_a_run_counts_stages_and_cells(golden: FinishedRun) -> None:
    lines = status(golden.folder / "out").splitlines()
    assert lines[0].startswith("stages: 32 of 32 done, ")
    assert lines[1:] == ["cells: 13 done"]


def test_the_status_of_a_run_under_way_says_what_runs(golden: FinishedRun, tmp_path: Path) -> None:
    shutil.copytree(golden.folder, tmp_path / "copy")
    store = Store(tmp_path / "copy" / "store")
    key = golden.cells["none--kd--mini-8--seed0"].keys["steal"]
    store.discard(key)
    write_json(store.checkpoint_folder(key) / "progress.json", {"share": 0.25, "text": "epoch 1/4"})
    lines = status(tmp_path / "copy" / "out").splitlines()
    assert lines[0].startswith("stages: 31 of 32 done, ")
    assert lines[1] == "  running: kd from none, seed 0 25% epoch 1/4"


def test_the_status_of_another_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KdbenchError, match="is not the results folder of a run"):
        status(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[]", '{"store": 3, "stages": [], "cells": []}', '{"store": ".", "stages": [{}], "cells": []}', "\xff"],
)
def test_a_damaged_plan_is_a_sentence(golden: FinishedRun, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    shutil.copyfile(golden.folder / "out" / "cells.jsonl", tmp_path / "cells.jsonl")
    said = rf"^{tmp_path}/plan\.json is damaged; `kdbench run` with `--out {tmp_path}` writes it again, and repeats nothing"
    with pytest.raises(KdbenchError, match=said):
        status(tmp_path)
    with pytest.raises(KdbenchError, match=said):
        network_figures.draw(tmp_path, ["answers"])


@pytest.mark.parametrize("out", ["mine.txt", "mine.txt/below"])
def test_results_that_have_no_place_are_refused_before_anything_is_done(
    golden: FinishedRun, tiny_file: str, tmp_path: Path, out: str
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    before = golden.copy(tmp_path / "before")
    wanted = request(before, out=tmp_path / out, force=True)
    with pytest.raises(
        KdbenchError, match=rf"^The results folder {tmp_path / out} cannot be used: .*Choose another with"
    ):
        command.run(tiny_file, wanted)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert Store(before / "store").finished() == golden.store.finished()


def test_a_change_is_a_toml_value_or_else_a_string() -> None:
    changes = ["attack.kd.temperature=20", "scenario.labels=false", "title=a b", "seeds=[1,2]", "a.b==c"]
    tree = command.Request(changes=changes).tree()
    assert tree == {"attack.kd.temperature": 20, "scenario.labels": False, "title": "a b", "seeds": [1, 2], "a.b": "=c"}


@pytest.mark.parametrize("text", ["omega", "=3", ""])
def test_a_change_without_a_path_or_a_value_is_a_sentence(text: str) -> None:
    with pytest.raises(KdbenchError, match="--set takes PATH=VALUE"):
        command.Request(changes=[text]).tree()


def test_a_device_that_is_not_there_is_a_sentence(tiny: Callable[..., Suite], tmp_path: Path) -> None:
    absent = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(KdbenchError, match=f"The device '{absent}' is not available here. Available: cpu"):
        Session(tiny(), options(tmp_path, device=absent), RecordedProgress())
