"""The plots of a folder: which are drawn, when, and where their names stand."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from made_up_cells import ended, made_up, matrix, write_cells

from kdbench.board import report
from kdbench.board.plots import drawing
from kdbench.board.plots.trade_off import spread_apart
from kdbench.board.studies import Studies
from kdbench.records import Status


def draw(folder: Path) -> list[Path]:
    """Draw the plots of a folder."""
    return drawing.draw(Studies.read(folder), folder)


def test_all_plots_are_drawn_and_only_once(tmp_path: Path) -> None:
    write_cells(matrix(), tmp_path)
    drawn = draw(tmp_path)
    names = {"student-accuracy", "protection", "trade-off", "adversarial-accuracy", "transfer"}
    assert {path.name for path in drawn} == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    for path in drawn:
        start = path.read_bytes()[:5]
        assert start == (b"\x89PNG\r" if path.suffix == ".png" else b"<?xml")
    before = {path: path.stat().st_mtime_ns for path in drawn}
    draw(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in drawn} == before
    drawn[0].unlink()
    assert draw(tmp_path)[0].exists()


def test_plots_without_numbers_are_not_drawn_and_old_ones_go(tmp_path: Path) -> None:
    draw(write_cells(matrix(), tmp_path))
    (tmp_path / drawing.FOLDER / "mine.png").write_text("not drawn by kdbench")
    drawn = draw(write_cells(matrix(more={}), tmp_path))
    assert {path.stem for path in drawn} == {"student-accuracy", "protection", "trade-off"}
    left = {path.name for path in (tmp_path / drawing.FOLDER).iterdir()}
    assert left == {path.name for path in drawn} | {"mine.png", drawing.DIGEST}


def test_each_student_has_plots_of_its_own() -> None:
    cells = matrix()
    cells += [replace(cell, student="zoo:tiny") for cell in cells]
    names = [plot.name for plot in drawing.plots(Studies.of(cells))]
    assert len(set(names)) == len(names) == 10
    assert "student-accuracy-zoo-tiny" in names


def test_plots_of_the_poorest_folders(tmp_path: Path) -> None:
    one = [made_up("nasty", "kd", 0, 0.8)]
    failed = ended(one, Status.FAILED, "training diverged")
    assert {p.stem for p in draw(write_cells(one, tmp_path / "one"))} == {"student-accuracy"}
    assert draw(write_cells(failed, tmp_path / "failed")) == []
    report.write_all(tmp_path / "failed")
    assert "training diverged" in (tmp_path / "failed" / "README.md").read_text()


def test_labels_beside_a_plot_keep_their_distance_and_their_order() -> None:
    assert spread_apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    crowded = spread_apart([0.0, 0.0, 0.01, 0.97, 1.0], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(crowded))
    assert min(crowded) >= 0
    assert max(crowded) <= 1 + 1e-9
