"""The recorder: records and predictions of a run come from its finished stages."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import kdbench
from kdbench import records
from kdbench.errors import KdbenchError
from kdbench.metrics import METRICS
from kdbench.records import Status
from kdbench.runs import prediction_file
from kdbench.runs.request import Request
from kdbench.suites.suite import Suite
from runs import DIVERGES, FinishedRun, options, run

RECOMPUTED = ("student_acc", "victim_acc", "fidelity")


def test_accuracies_and_fidelity_can_be_recomputed_exactly_from_the_kept_predictions_alone(golden: FinishedRun) -> None:
    found = kdbench.load(golden.folder / "out").recomputed()
    assert found == {
        cell.name: {name: cell.metrics[name] for name in RECOMPUTED if name in cell.metrics}
        for cell in golden.cells.values()
    }
    assert {len(numbers) for numbers in found.values()} == {1, 3}


def test_a_results_folder_holds_a_plan_records_and_predictions(golden: FinishedRun) -> None:
    names = {path.name for path in (golden.folder / "out").iterdir()}
    assert names == {"plan.json", records.FILE, prediction_file.FILE}


def test_records_hold_declared_metrics_and_the_methods_own_numbers_apart(golden: FinishedRun) -> None:
    for cell in golden.cells.values():
        assert cell.metrics.keys() <= METRICS.keys()
        assert all("." in name for name in cell.numbers)
        assert "queries" in cell.metrics
        assert cell.metrics["queries"] == round(cell.metrics["queries"])


def test_methods_say_of_themselves_what_boards_must_know(golden: FinishedRun) -> None:
    defenses = {cell.defense.name: cell.defense for cell in golden.cells.values() if cell.defense}
    attacks = {cell.attack.name: cell.attack for cell in golden.cells.values()}
    assert [name for name, defense in defenses.items() if defense.is_reference] == ["none"]
    assert [name for name, attack in attacks.items() if attack.labels_only] == ["hard-label"]


def test_a_cell_that_failed_has_a_reason_and_no_predictions(
    tiny: Callable[..., Suite], golden: FinishedRun, tmp_path: Path
) -> None:
    cells = run(tiny(DIVERGES), golden.copy(tmp_path))
    failed = {name for name, cell in cells.items() if cell.status is Status.FAILED}
    assert {cells[name].reason for name in failed} == {"training diverged: the loss was not finite in epoch 0"}
    found = kdbench.load(options(tmp_path).out).recomputed()
    assert found.keys() == cells.keys() - failed


def test_a_folder_with_the_cells_of_another_matrix_is_refused(
    tiny: Callable[..., Suite], golden: FinishedRun, tmp_path: Path
) -> None:
    folder = golden.copy(tmp_path)
    run(tiny({"attacks": ["kd"], "defenses": ["none"]}), folder)
    before = (folder / "out" / records.FILE).read_bytes()
    with pytest.raises(KdbenchError, match=r"holds \d cells of another matrix \(.*\.\.\.\)\. Choose another folder"):
        run(tiny({"attacks": ["kd"], "defenses": ["nasty"], "baselines": []}), folder)
    assert (folder / "out" / records.FILE).read_bytes() == before


def test_the_same_run_again_writes_the_same_bytes(
    tiny: Callable[..., Suite], golden: FinishedRun, tmp_path: Path
) -> None:
    folder = golden.copy(tmp_path)
    run(tiny(), folder)
    for name in (records.FILE, prediction_file.FILE):
        assert (folder / "out" / name).read_bytes() == (golden.folder / "out" / name).read_bytes()


# The door for users in Python


def test_python_runs_a_suite_and_gets_its_results(golden: FinishedRun, tiny_file: str, tmp_path: Path) -> None:
    request = Request(store=golden.copy(tmp_path) / "store", out=tmp_path / "out", device="cpu", jobs=2, quiet=True)
    results = kdbench.run(tiny_file, replace(request, attack=["kd"], defense=["none"]))
    assert {cell.name for cell in results.cells} <= golden.cells.keys()
    assert results.cells == kdbench.load(tmp_path / "out").cells


def test_results_become_a_frame_with_a_row_a_cell(golden: FinishedRun) -> None:
    frame = kdbench.load(golden.folder / "out").frame()
    assert len(frame) == len(golden.cells)
    by_defense = frame.groupby("defense")["student_acc"].mean()
    nasty = [c.metrics["student_acc"] for c in golden.cells.values() if c.defense and c.defense.name == "nasty"]
    assert by_defense["nasty"] == pytest.approx(sum(nasty) / len(nasty))
    assert frame["status"].eq("done").all()
