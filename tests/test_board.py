"""The board, on made-up cells: every number in here was chosen so that a person can check the result by hand."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kdbench import records as results
from kdbench.board import report
from kdbench.board.boards import accuracy_board, leaderboards, render, robustness_board, write_boards
from kdbench.board.document import FORMATS, Board, Row
from kdbench.board.intervals import Estimate, estimate, paired, ranks
from kdbench.board.plots import drawing as plots
from kdbench.board.plots.figures import _spread
from kdbench.board.study import DefenseRow, RankStatus, Study, studies
from kdbench.errors import KdbenchError
from kdbench.records import Cell, MethodRecord, Status

T_2 = 4.302652729749462  # 97.5 % quantile of Student's t with 2 degrees of freedom, from a printed table: 4.303


def played(defense: str | None, attack: str, seed: int, student_acc: float, **changes: Any) -> Cell:
    """A made-up cell that is done; `student_val_acc`, other metrics and other fields by name."""
    metrics = {"student_acc": student_acc, "student_val_acc": changes.pop("val", student_acc)}
    if defense:
        metrics |= {"victim_acc": changes.pop("victim_acc", 0.96), "queries": 1000, "fidelity": 0.9}
    metrics |= changes.pop("more", {})
    cell = Cell(
        suite="made-up",
        dataset="nothing",
        dataset_digest="0" * 8,
        classes=10,
        victim="big",
        student="small",
        defense=MethodRecord(defense, defense, {}, "made up") if defense else None,
        attack=MethodRecord(attack, attack, {}, "made up"),
        adaptive=False,
        seed=seed,
        scenario={"access": "probs", "budget": None, "data": 1.0, "labels": True, "topk": 5},
        subset={"fraction": 1.0, "seed": 0},
        tolerance=0.02,
        status=Status.DONE,
        metrics=metrics,
    )
    return replace(cell, **changes)


def over_seeds(defense: str | None, attack: str, student_accs: Iterable[float], **changes: Any) -> list[Cell]:
    """One cell a seed, from seed 0."""
    return [played(defense, attack, seed, acc, **changes) for seed, acc in enumerate(student_accs)]


def ended(cells: Iterable[Cell], status: Status, reason: str = "") -> list[Cell]:
    """The same cells, ended otherwise; only bypassed ones keep their numbers."""
    kept = status is Status.BYPASSED
    return [replace(c, status=status, reason=reason, metrics=c.metrics if kept else {}) for c in cells]


def only(cells: Iterable[Cell]) -> Study:
    """The standings of the one student."""
    (found,) = studies(cells)
    return found


def entries(cells: Iterable[Cell]) -> dict[str, DefenseRow]:
    """The board's entries by the defense's label, in the board's order."""
    return {entry.defense.name: entry for entry in only(cells).rows()}


def rows(board: Board, table: str) -> list[Row]:
    """All rows of the tables of that name."""
    return [row for found in board.tables if found.name == table for row in found.rows]


def write_all_cells(cells: Iterable[Cell], folder: Path) -> Path:
    """Put the cells into result files under `folder`."""
    for cell in cells:
        results.write(cell, folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """The content of everything under `folder` by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ROBUST = {
    "victim_adv_fgsm": 0.5,
    "victim_adv_pgd": 0.3,
    "student_adv_fgsm": 0.4,
    "student_adv_pgd": 0.2,
    "victim_cw_l2": 0.8,
    "transfer": 0.6,
}


def matrix(more: Mapping[str, float] = ROBUST) -> list[Cell]:
    """Three defenses against three attacks and two baselines, with every way in which a cell can end."""
    digits = [0.0, 0.01, 0.02]
    cells = []
    for index, defense in enumerate(("none", "nasty", "stingy")):
        loss = {"victim_acc": 0.96 - 0.005 * index, "more": dict(more)}
        cells += over_seeds(defense, "kd", [0.9 - 0.05 * index + d for d in digits], **loss)
        cells += over_seeds(defense, "hard-label", [0.85 - 0.01 * index - d for d in digits], **loss)
        weights = over_seeds(
            defense, "inversion", [0.7 + d for d in digits], subset={"fraction": 0.0, "seed": 0}, **loss
        )
        cells += ended(weights, Status.BYPASSED) if defense == "stingy" else weights
    cells += ended(over_seeds("nasty", "tuned", [0.5] * 2, adaptive=True), Status.FAILED, "training diverged")
    cells += ended(over_seeds("none", "tuned", [0.5] * 2, adaptive=True), Status.SKIPPED, "needs probs")
    cells += over_seeds(None, "cross-entropy", [0.8, 0.81, 0.82])
    return cells + over_seeds(None, "label-smoothing", [0.83, 0.8, 0.86])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subset": {}}, ".owned: the field 'fraction' is missing."),
        ({"subset": {"fraction": "x", "seed": 0}}, ".owned.fraction must be a valid number, not 'x'."),
        ({"subset": {"fraction": 1, "seed": 0.5}}, ".owned.seed must be a valid integer, not 0.5."),
        ({"metrics": {"fidelity": 1, "student_acc": float("nan")}}, ".metrics.student_acc must be a finite number, not nan."),
        ({"metrics": {"fidelity": 1, "student_acc": None}}, ".metrics.student_acc must be a finite number, not None."),
        ({"seconds": {"steal": float("inf")}}, ".seconds.steal must be a finite number, not inf."),
        ({"metrics": 3}, ".metrics must be an object, not 3."),
    ],
)  # fmt: skip
def test_a_damaged_cell_is_told_with_its_file_and_the_field(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = results.write(played("none", "kd", 0, 0.9), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(KdbenchError) as caught:
        results.read(tmp_path)
    assert str(caught.value) == f"{path}{said}"


def test_a_folder_with_the_name_of_a_cell_is_told(tmp_path: Path) -> None:
    path = tmp_path / results.FOLDER / "x.json"
    path.mkdir(parents=True)
    with pytest.raises(KdbenchError, match=rf"^{path} cannot be read: Is a directory\.$"):
        results.read(tmp_path)


def test_an_interval_is_students_t() -> None:
    found = estimate({0: 0.10, 1: 0.08, 2: 0.14})
    assert found is not None
    assert found.mean == pytest.approx(0.32 / 3)
    # deviations -2/300, -8/300, 10/300: their squares sum to 168/90000, so the variance is 84/90000
    assert found.half_width == pytest.approx(T_2 * (84 / 90000) ** 0.5 / 3**0.5)
    assert found.n == 3


def test_one_seed_has_no_interval_and_none_no_estimate() -> None:
    assert estimate({7: 0.5}) == Estimate(0.5, None, 1)
    assert estimate({}) is None


def test_differences_are_paired_by_seed_and_free_of_rounding() -> None:
    assert paired({0: 0.9, 1: 0.8, 3: 0.7}, {0: 0.8, 1: 0.7, 2: 0.1}) == {0: 0.1, 1: 0.1}


def test_overlapping_intervals_share_a_rank() -> None:
    high, middle, low = Estimate(0.20, 0.02, 3), Estimate(0.17, 0.02, 3), Estimate(0.14, 0.02, 3)
    assert ranks([low, high, middle]) == [2, 1, 1]
    touching = Estimate(0.25, 0.05, 3)
    assert ranks([touching, Estimate(0.15, 0.05, 3)]) == [1, 1]


def test_without_intervals_all_share_rank_1_and_losing_seeds_earns_none() -> None:
    alone, worse = Estimate(0.9, None, 1), Estimate(0.1, None, 1)
    assert ranks([alone, worse, None]) == [1, 1, None]
    assert ranks([alone, Estimate(0.5, 0.1, 3), Estimate(0.2, 0.1, 3)]) == [None, 1, 2]


def test_protection_is_the_same_attack_on_none_minus_here() -> None:
    cells = over_seeds("none", "kd", [0.90, 0.92, 0.94]) + over_seeds("nasty", "kd", [0.80, 0.84, 0.80])
    found = only(cells)
    protection = found.protection(found.pairings["nasty", "kd"])
    assert protection is not None
    assert protection.mean == pytest.approx(0.32 / 3)
    assert protection.half_width == pytest.approx(T_2 * (84 / 90000) ** 0.5 / 3**0.5)
    assert entries(cells)["nasty"].protection == protection
    assert entries(cells)["none"].protection == Estimate(0.0, 0.0, 3)


def test_a_seed_that_failed_on_one_side_is_left_out_of_the_pair() -> None:
    on_none = over_seeds("none", "kd", [0.90, 0.50, 0.94])
    on_none[1:2] = ended(on_none[1:2], Status.FAILED, "training diverged")
    cells = on_none + over_seeds("nasty", "kd", [0.80, 0.99, 0.80])
    protection = entries(cells)["nasty"].protection
    assert protection is not None
    assert protection.n == 2
    assert protection.mean == pytest.approx((0.10 + 0.14) / 2)


def test_utility_loss_is_paired_by_seed() -> None:
    cells = over_seeds("none", "kd", [0.9, 0.9])
    cells += [played("nasty", "kd", seed, 0.8, victim_acc=acc) for seed, acc in enumerate([0.95, 0.93])]
    loss = only(cells).utility_loss("nasty")
    assert loss is not None
    assert loss.mean == pytest.approx(0.02)
    assert loss.n == 2


def test_the_best_response_is_chosen_on_validation_data_and_told_by_its_test_accuracy() -> None:
    cells = over_seeds("none", "kd", [0.9] * 3)
    cells += over_seeds("nasty", "kd", [0.85] * 3, val=0.80) + over_seeds("nasty", "tuned", [0.82] * 3, val=0.84)
    entry = entries(cells)["nasty"]
    assert entry.best is not None
    assert entry.best.attack.name == "tuned"
    (row,) = [row for row in rows(accuracy_board(cells), "ranking") if row["defense"] == "nasty"]
    assert row["student_acc"] == Estimate(0.82, 0.0, 3)
    assert row["protection"] == Estimate(0.08, 0.0, 3)


def test_an_attack_that_went_past_the_defense_is_not_scored_on_either_side() -> None:
    strong = {"none": 0.95, "stingy": 0.95}
    cells = [c for d, acc in strong.items() for c in over_seeds(d, "inversion", [acc] * 3)]
    cells = cells[:3] + ended(cells[3:], Status.BYPASSED)
    cells += over_seeds("none", "kd", [0.90] * 3) + over_seeds("stingy", "kd", [0.85] * 3)
    entry = entries(cells)["stingy"]
    assert entry.best is not None
    assert entry.best.attack.name == "kd"
    # 0.10 would credit the defense with the theft by inversion that it did nothing against
    assert entry.protection == Estimate(0.05, 0.0, 3)
    assert "bypassed: inversion" in entry.marks
    (row,) = [
        r for r in rows(accuracy_board(cells), "attacks") if (r["defense"], r["attack"]) == ("stingy", "inversion")
    ]
    assert row["student_acc"] is None
    assert row["bypassed_acc"] == Estimate(0.95, 0.0, 3)
    assert any("Bypassed" in note for note in accuracy_board(cells).notes)


def test_a_defense_that_no_adaptive_attack_was_scored_against_is_unexamined() -> None:
    cells = over_seeds("none", "kd", [0.9] * 3)
    cells += over_seeds("nasty", "kd", [0.8] * 3) + over_seeds("stingy", "kd", [0.8] * 3)
    cells += over_seeds("nasty", "tuned", [0.7] * 3, adaptive=True)
    cells += ended(over_seeds("stingy", "tuned", [0.7] * 3, adaptive=True), Status.FAILED, "out of memory")
    marks = {label: entry.marks for label, entry in entries(cells).items()}
    assert marks == {"none": (), "nasty": (), "stingy": ("unexamined", "failed: 3")}


def test_a_defense_outside_the_tolerance_stands_below_the_line() -> None:
    cells = over_seeds("none", "kd", [0.90] * 3)
    cells += over_seeds("nasty", "kd", [0.10] * 3, victim_acc=0.93)
    cells += over_seeds("stingy", "kd", [0.85] * 3, victim_acc=0.94)
    found = entries(cells)
    assert list(found) == ["stingy", "none", "nasty"]
    assert [entry.rank for entry in found.values()] == [1, 2, None]
    assert found["stingy"].standing is RankStatus.RANKED  # a loss of exactly the tolerance is inside
    assert found["nasty"].standing is RankStatus.LOSSY
    lines = render(accuracy_board(cells), "md").splitlines()
    line = next(index for index, text in enumerate(lines) if "below the line: loss above 2 points" in text)
    assert "nasty" in lines[line + 1]


def test_defenses_are_sorted_by_rank_then_protection_then_label() -> None:
    cells = over_seeds("none", "kd", [0.9, 0.9, 0.9])
    for defense in ("b", "a"):
        cells += over_seeds(defense, "kd", [0.80, 0.82, 0.81])
    cells += over_seeds("c", "kd", [0.79, 0.81, 0.83])
    cells += over_seeds("d", "kd", [0.70, 0.70, 0.70])
    found = entries(cells)
    assert list(found) == ["d", "a", "b", "c", "none"]
    assert [entry.rank for entry in found.values()] == [1, 2, 2, 2, 5]


def test_net_gain_is_over_the_baseline_that_validation_chose_on_the_same_part_of_the_data() -> None:
    tenth = {"fraction": 0.1, "seed": 4}
    cells = over_seeds("none", "kd", [0.90, 0.92]) + over_seeds("none", "partial", [0.70, 0.72], subset=tenth)
    cells += over_seeds(None, "cross-entropy", [0.88, 0.91], val=0.80)
    cells += over_seeds(None, "label-smoothing", [0.85, 0.86], val=0.81)
    cells += over_seeds(None, "cross-entropy", [0.60, 0.64], subset=tenth)
    found = only(cells)
    gains = {attack: found.gain(found.pairings["none", attack]) for attack in ("kd", "partial")}
    assert gains["kd"] is not None
    assert gains["kd"].mean == pytest.approx((0.05 + 0.06) / 2)
    assert gains["partial"] is not None
    assert gains["partial"].mean == pytest.approx((0.10 + 0.08) / 2)
    chosen = {(row["baseline"], row["fraction"]): row["chosen"] for row in rows(accuracy_board(cells), "baselines")}
    assert chosen == {("cross-entropy", 1): False, ("label-smoothing", 1): True, ("cross-entropy", 0.1): True}


def test_a_thief_without_data_is_compared_with_guessing() -> None:
    found = only(over_seeds("none", "inversion", [0.65, 0.75], subset={"fraction": 0.0, "seed": 0}))
    gain = found.gain(found.pairings["none", "inversion"])
    assert gain is not None
    assert gain.mean == pytest.approx(0.6)


def test_gain_over_labels_is_over_the_hard_label_thief_of_the_same_defense_and_data() -> None:
    cells = over_seeds("nasty", "kd", [0.80, 0.82]) + over_seeds("nasty", "hard-label", [0.78, 0.79])
    cells += over_seeds("nasty", "partial", [0.8, 0.8], subset={"fraction": 0.1, "seed": 0})
    found = only(cells)
    gain = found.gain_over_labels(found.pairings["nasty", "kd"])
    assert gain is not None
    assert gain.mean == pytest.approx((0.02 + 0.03) / 2)
    assert found.gain_over_labels(found.pairings["nasty", "partial"]) is None
    assert found.gain_over_labels(found.pairings["nasty", "hard-label"]) is None


def test_without_none_and_baselines_nothing_is_made_up() -> None:
    board = accuracy_board(over_seeds("nasty", "kd", [0.8] * 3))
    (row,) = rows(board, "ranking")
    assert [row[name] for name in ("rank", "protection", "utility_loss", "gain")] == [None] * 4
    assert row["student_acc"] == Estimate(0.8, 0.0, 3)
    assert any("'none'" in note for note in board.notes)
    assert any("No baseline" in note for note in board.notes)


def test_one_seed_gives_no_intervals_and_one_rank() -> None:
    cells = [played("none", "kd", 0, 0.9), played("nasty", "kd", 0, 0.8), played("stingy", "kd", 0, 0.85)]
    board = accuracy_board(cells)
    assert [(row["defense"], row["rank"], row["n"]) for row in rows(board, "ranking")] == [
        ("nasty", 1, 1),
        ("stingy", 1, 1),
        ("none", 1, 1),
    ]
    assert "at least 3 seeds" in board.notes[0]
    assert "±" not in render(board, "table", 200)


def test_each_student_has_a_section_of_its_own() -> None:
    cells = over_seeds("none", "kd", [0.9] * 3) + over_seeds("nasty", "kd", [0.8] * 3)
    cells += [replace(cell, student="tiny", metrics=cell.metrics | {"student_acc": 0.5}) for cell in cells]
    found = {row["student"]: row["protection"] for row in rows(accuracy_board(cells), "ranking") if row["rank"] == 1}
    assert found == {"small": Estimate(0.1, 0.0, 3), "tiny": Estimate(0.0, 0.0, 3)}
    assert "student tiny" in render(accuracy_board(cells), "md")


def test_the_robustness_board_ranks_by_the_worst_adversarial_accuracy_against_none() -> None:
    def tried(defense: str, fgsm: Iterable[float], pgd: float) -> list[Cell]:
        metrics = [{"victim_adv_fgsm": value, "victim_adv_pgd": pgd} for value in fgsm]
        return [played(defense, "kd", seed, 0.8, more=more) for seed, more in enumerate(metrics)]

    cells = tried("none", [0.5, 0.5, 0.5], 0.3) + tried("nasty", [0.5, 0.2, 0.5], 0.4) + tried("wide", [0.6] * 3, 0.55)
    found = {row["defense"]: row for row in rows(robustness_board(cells), "ranking")}
    assert found["nasty"]["worst_adv"] == estimate({0: 0.4, 1: 0.2, 2: 0.4})
    assert found["nasty"]["gain_over_none"] == estimate({0: 0.1, 1: -0.1, 2: 0.1})
    assert {label: row["rank"] for label, row in found.items()} == {"wide": 1, "nasty": 1, "none": 2}


def test_students_and_transfer_are_listed_where_the_defense_was_met() -> None:
    found = {(row["defense"], row["attack"]): row for row in rows(robustness_board(matrix()), "attacks")}
    assert found["nasty", "kd"]["transfer"] == Estimate(0.6, 0.0, 3)
    assert found["nasty", "kd"]["student_adv_pgd"] == Estimate(0.2, 0.0, 3)
    assert ("stingy", "inversion") not in found


def test_formats_can_be_read_back() -> None:
    board = accuracy_board(matrix())
    for row, line in zip(rows(board, "ranking"), csv.DictReader(StringIO(render(board, "csv"))), strict=True):
        protection = row["protection"]
        assert isinstance(protection, Estimate)
        assert line["defense"] == row["defense"]
        assert float(line["protection"]) == pytest.approx(protection.mean, abs=1e-6)
        assert float(line["protection_half"]) == pytest.approx(protection.half_width, abs=1e-6)
        assert line["protection_n"] == "3"
    content = json.loads(render(board, "json"))
    assert content["schema"] == 1
    assert content["seeds"] == [0, 1, 2]
    assert {row["defense"] for row in content["tables"]["ranking"]} == {"none", "nasty", "stingy"}
    assert set(content["columns"]) == set(content["tables"])
    for name, table in content["tables"].items():
        assert all(set(row) == set(content["columns"][name]) for row in table)
    assert "<table" in render(board, "html")


def test_every_format_names_every_defense() -> None:
    for board in (accuracy_board(matrix()), robustness_board(matrix())):
        for format in FORMATS:
            assert all(label in render(board, format, 160) for label in ("none", "nasty", "stingy"))


def test_a_terminal_line_is_no_longer_than_the_terminal() -> None:
    for width in (80, 100, 160):
        assert max(len(line) for line in render(accuracy_board(matrix()), "table", width).splitlines()) <= width


def test_labels_cannot_break_a_table() -> None:
    cells = over_seeds("a|b", "<i>[bold]", [0.8] * 3)
    board = accuracy_board(cells)
    assert "a\\|b" in render(board, "md")
    assert "<i>" not in render(board, "html")
    assert "[bold]" in render(board, "table", 160)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(KdbenchError, match=r"no format 'jsn'. Did you mean 'json'"):
        render(accuracy_board(matrix()), "jsn")


def test_a_folder_without_results_is_the_users_mistake(tmp_path: Path) -> None:
    for make in (write_boards, plots.draw, report.write_all, leaderboards):
        with pytest.raises(KdbenchError, match="no results"):
            make(tmp_path)
    with pytest.raises(KdbenchError, match="no cell"):
        accuracy_board([])


def test_cells_of_two_benchmarks_are_not_mixed() -> None:
    cells = over_seeds("none", "kd", [0.9] * 2)
    with pytest.raises(KdbenchError, match="dataset_digest"):
        accuracy_board([*cells, replace(cells[0], seed=9, dataset_digest="1")])
    other = MethodRecord("kd", "kd", {"temperature": 20.0}, "made up")
    with pytest.raises(KdbenchError, match="'kd' is several things"):
        accuracy_board([*cells, replace(cells[0], seed=9, attack=other)])


def test_the_order_of_the_cells_does_not_matter() -> None:
    cells = matrix()
    cells += [replace(cell, student="tiny") for cell in cells]
    for make in (accuracy_board, robustness_board):
        assert make(cells) == make(list(reversed(cells)))


def test_the_report_is_a_function_of_the_cells(tmp_path: Path) -> None:
    first = write_all_cells(matrix(), tmp_path / "first")
    second = write_all_cells(reversed(matrix()), tmp_path / "second")
    report.write_all(first)
    report.write_all(second)
    once = files(first)
    assert once == files(second)
    for path in [p for p in first.rglob("*") if p.is_file() and p.parent.name != results.FOLDER]:
        path.unlink()
    report.write_all(first)
    assert files(first) == once


def test_seconds_and_machines_do_not_change_a_leaderboard(tmp_path: Path) -> None:
    slow = [replace(cell, seconds={"steal": 99.0}, machine={"device": "abacus"}) for cell in matrix()]
    write_boards(write_all_cells(matrix(), tmp_path / "fast"))
    write_boards(write_all_cells(slow, tmp_path / "slow"))
    boards = {name: content for name, content in files(tmp_path / "fast").items() if "cells" not in name}
    assert len(boards) == 8
    assert boards == {name: content for name, content in files(tmp_path / "slow").items() if "cells" not in name}


def test_a_board_without_numbers_is_taken_away(tmp_path: Path) -> None:
    write_boards(write_all_cells(matrix(), tmp_path))
    assert (tmp_path / "robustness.md").exists()
    write_boards(write_all_cells(matrix(more={}), tmp_path))
    assert not list(tmp_path.glob("robustness*"))
    assert (tmp_path / "leaderboard.md").exists()


def test_all_plots_are_drawn_and_only_once(tmp_path: Path) -> None:
    write_all_cells(matrix(), tmp_path)
    drawn = plots.draw(tmp_path)
    names = {"stolen-accuracy", "protection", "trade-off", "adversarial-accuracy", "transfer"}
    assert {path.name for path in drawn} == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    for path in drawn:
        start = path.read_bytes()[:5]
        assert start == (b"\x89PNG\r" if path.suffix == ".png" else b"<?xml")
    before = {path: path.stat().st_mtime_ns for path in drawn}
    plots.draw(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in drawn} == before
    drawn[0].unlink()
    assert plots.draw(tmp_path)[0].exists()


def test_plots_without_numbers_are_not_drawn_and_old_ones_go(tmp_path: Path) -> None:
    plots.draw(write_all_cells(matrix(), tmp_path))
    (tmp_path / plots.FOLDER / "mine.png").write_text("not drawn by kdbench")
    drawn = plots.draw(write_all_cells(matrix(more={}), tmp_path))
    assert {path.stem for path in drawn} == {"stolen-accuracy", "protection", "trade-off"}
    left = {path.name for path in (tmp_path / plots.FOLDER).iterdir()}
    assert left == {path.name for path in drawn} | {"mine.png", plots.DIGEST}


def test_each_student_has_plots_of_its_own() -> None:
    cells = matrix()
    cells += [replace(cell, student="zoo:tiny") for cell in cells]
    names = [plot.name for plot in plots.plots(cells)]
    assert len(set(names)) == len(names) == 10
    assert "stolen-accuracy-zoo-tiny" in names


def test_plots_of_the_poorest_folders(tmp_path: Path) -> None:
    one = [played("nasty", "kd", 0, 0.8)]
    failed = ended(one, Status.FAILED, "training diverged")
    assert {p.stem for p in plots.draw(write_all_cells(one, tmp_path / "one"))} == {"stolen-accuracy"}
    assert plots.draw(write_all_cells(failed, tmp_path / "failed")) == []
    report.write_all(tmp_path / "failed")
    assert "training diverged" in (tmp_path / "failed" / "README.md").read_text()


def test_labels_beside_a_plot_keep_their_distance_and_their_order() -> None:
    assert _spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert _spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    crowded = _spread([0.0, 0.0, 0.01, 0.97, 1.0], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(crowded))
    assert min(crowded) >= 0
    assert max(crowded) <= 1 + 1e-9


def test_the_report_shows_what_was_played_what_it_cost_and_its_pictures(tmp_path: Path) -> None:
    shared = {"train": "train/t", "harden": "train/t", "steal": "steal/a"}
    seconds = {"train": 10.0, "harden": 10.0, "steal": 3.0}
    cells = [
        played("none", "kd", 0, 0.9, keys=shared, seconds=seconds, pictures=["pictures/a sheet.png"]),
        played("nasty", "kd", 0, 0.8, keys=shared | {"steal": "steal/b"}, seconds=seconds | {"steal": 5.0}),
    ]
    report.write_all(write_all_cells(cells, tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "answers probs, budget null, data 1.0, labels true, topk 5" in text
    assert "| train | 1 | 10.0 | 10.00 |" in text  # two cells share the victim, and none hardens nothing
    assert "| steal | 2 | 8.0 | 4.00 |" in text
    assert "| kd | 4.00 | 1,000 |" in text
    assert "(pictures/a%20sheet.png)" in text
    assert "(plots/stolen-accuracy.png)" in text
    assert "## Leaderboard: made-up" in text
