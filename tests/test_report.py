"""The report of a results folder."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_up_cells import files, leaderboard, made_up, matrix, write_cells

from kdbench import records
from kdbench.board import report
from kdbench.board.studies import Studies
from kdbench.errors import KdbenchError


def test_a_folder_without_results_is_the_users_mistake(tmp_path: Path) -> None:
    for make in (report.write_all, report.write_report, Studies.read):
        with pytest.raises(KdbenchError, match="no results"):
            make(tmp_path)
    with pytest.raises(KdbenchError, match="no cell"):
        leaderboard([])


def test_the_report_is_a_function_of_the_cells(tmp_path: Path) -> None:
    first = write_cells(matrix(), tmp_path / "first")
    second = write_cells(reversed(matrix()), tmp_path / "second")
    report.write_all(first)
    report.write_all(second)
    once = files(first)
    assert once == files(second)
    for path in [p for p in first.rglob("*") if p.is_file() and p.name != records.FILE]:
        path.unlink()
    report.write_all(first)
    assert files(first) == once


def test_the_report_shows_what_was_run_what_it_cost_and_its_pictures(tmp_path: Path) -> None:
    shared = {"train": "train/t", "harden": "train/t", "steal": "steal/a"}
    seconds = {"train": 10.0, "harden": 10.0, "steal": 3.0}
    cells = [
        made_up("none", "kd", 0, 0.9, keys=shared, seconds=seconds, pictures=("pictures/a sheet.png",)),
        made_up("nasty", "kd", 0, 0.8, keys=shared | {"steal": "steal/b"}, seconds=seconds | {"steal": 5.0}),
    ]
    report.write_all(write_cells(cells, tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "access probs, budget null, data 1.0, labels true, topk 5" in text
    assert "| train | 1 | 10.0 | 10.00 |" in text  # two cells share the victim, and none hardens nothing
    assert "| steal | 2 | 8.0 | 4.00 |" in text
    assert "| kd | 4.00 | 1,000 |" in text
    assert "(pictures/a%20sheet.png)" in text
    assert "(plots/student-accuracy.png)" in text
    assert "## Leaderboard: made-up" in text


def test_the_board_needs_neither_torch_nor_the_engine() -> None:
    code = "import sys, kdbench.board.report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "torch" not in loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("kdbench.")}
    assert rooms <= {"board", "records", "metrics", "errors", "migration", "atomic"}
