"""The boards, on made-up cells: every number in here was chosen so that a person can check the result by hand."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_cells import (
    attack,
    everything,
    files,
    leaderboard,
    made_up,
    matrix,
    over_seeds,
    robustness,
    rows,
    write_cells,
)

from kdbench import records
from kdbench.board.boards import boards, write_boards
from kdbench.board.document import Board
from kdbench.board.formats.rendering import render
from kdbench.board.intervals import Estimate, estimate
from kdbench.board.studies import Studies
from kdbench.errors import KdbenchError
from kdbench.metrics import METRICS
from kdbench.records import Cell


def write_both(folder: Path) -> None:
    """Write the boards of a folder."""
    write_boards(boards(Studies.read(folder)), folder)


def sections(board: Board) -> Any:
    """All of a board that formats show."""
    tables = [(t.name, t.full_title, [c.name for c in t.columns], t.rows, t.breaks) for t in board.tables]
    return board.name, board.facts, board.notes, tables


def test_without_none_and_baselines_nothing_is_made_up() -> None:
    board = leaderboard(over_seeds("nasty", "kd", [0.8] * 3))
    (row,) = rows(board, "ranking")
    assert [row[name] for name in ("rank", "protection", "utility_loss", "gain")] == [None] * 4
    assert row["student_acc"] == Estimate(0.8, 0.0, 3)
    assert any("undefended victim was not attacked" in note for note in board.notes)
    assert any("No no-query baseline" in note for note in board.notes)


def test_one_seed_gives_no_intervals_and_one_rank() -> None:
    cells = [made_up("none", "kd", 0, 0.9), made_up("nasty", "kd", 0, 0.8), made_up("stingy", "kd", 0, 0.85)]
    board = leaderboard(cells)
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
    found = {row["student"]: row["protection"] for row in rows(leaderboard(cells), "ranking") if row["rank"] == 1}
    assert found == {"small": Estimate(0.1, 0.0, 3), "tiny": Estimate(0.0, 0.0, 3)}
    assert "student tiny" in render(leaderboard(cells), "md")


def test_the_robustness_board_ranks_by_the_worst_adversarial_accuracy_against_none() -> None:
    def tried(defense: str, fgsm: Iterable[float], pgd: float) -> list[Cell]:
        metrics = [{"victim_robust_fgsm": value, "victim_robust_pgd": pgd} for value in fgsm]
        return [made_up(defense, "kd", seed, 0.8, more=more) for seed, more in enumerate(metrics)]

    cells = tried("none", [0.5, 0.5, 0.5], 0.3) + tried("nasty", [0.5, 0.2, 0.5], 0.4) + tried("wide", [0.6] * 3, 0.55)
    found = {row["defense"]: row for row in rows(robustness(cells), "ranking")}
    assert found["nasty"]["worst_robust"] == estimate({0: 0.4, 1: 0.2, 2: 0.4})
    assert found["nasty"]["gain_over_undefended"] == estimate({0: 0.1, 1: -0.1, 2: 0.1})
    assert {name: row["rank"] for name, row in found.items()} == {"wide": 1, "nasty": 1, "none": 2}


def test_students_and_transfer_are_listed_where_the_defense_was_met() -> None:
    found = {(row["defense"], row["attack"]): row for row in rows(robustness(matrix()), "attacks")}
    assert found["nasty", "kd"]["transfer"] == Estimate(0.6, 0.0, 3)
    assert found["nasty", "kd"]["student_robust_pgd"] == Estimate(0.2, 0.0, 3)
    assert ("stingy", "inversion") not in found


def test_cells_of_two_suites_are_not_mixed() -> None:
    cells = over_seeds("none", "kd", [0.9] * 2)
    with pytest.raises(KdbenchError, match="dataset_digest"):
        leaderboard([*cells, replace(cells[0], seed=9, dataset_digest="1")])
    other = attack("kd", temperature=20.0)
    with pytest.raises(KdbenchError, match="'kd' is several things"):
        leaderboard([*cells, replace(cells[0], seed=9, attack=other)])


def test_the_order_of_the_cells_does_not_matter() -> None:
    cells = matrix()
    cells += [replace(cell, student="tiny") for cell in cells]
    for make in (leaderboard, robustness):
        assert sections(make(cells)) == sections(make(list(reversed(cells))))


def test_seconds_and_machines_do_not_change_a_leaderboard(tmp_path: Path) -> None:
    slow = [replace(cell, seconds={"steal": 99.0}, machine={"device": "abacus"}) for cell in matrix()]
    write_both(write_cells(matrix(), tmp_path / "fast"))
    write_both(write_cells(slow, tmp_path / "slow"))
    boards = {name: content for name, content in files(tmp_path / "fast").items() if "cells" not in name}
    assert len(boards) == 8
    assert boards == {name: content for name, content in files(tmp_path / "slow").items() if "cells" not in name}


def test_a_board_without_numbers_is_taken_away(tmp_path: Path) -> None:
    write_both(write_cells(matrix(), tmp_path))
    assert (tmp_path / "robustness.md").exists()
    write_both(write_cells(matrix(more={}), tmp_path))
    assert not list(tmp_path.glob("robustness*"))
    assert (tmp_path / "leaderboard.md").exists()


def test_every_column_is_filled_in_some_row_of_a_full_matrix() -> None:
    for board in (leaderboard(everything()), robustness(everything())):
        for table in board.tables:
            assert table.rows, f"{board.name}: {table.name} has no rows"
            values = {column.name: {str(row[i]) for row in table.rows} for i, column in enumerate(table.columns)}
            empty = [name for name, found in values.items() if found <= {"None", ""}]
            assert not empty, f"{board.name}, {table.name}: {empty}"


def test_every_metric_has_a_column_that_shows_its_own_number() -> None:
    cells = everything()
    [cell] = [c for c in cells if c.name == "nasty--kd--small--seed0"]
    shown: dict[str, set[float]] = {}
    for board in (leaderboard(cells), robustness(cells)):
        for name in {table.name for table in board.tables}:
            for row in rows(board, name):
                if row.get("defense") == "nasty" and row.get("attack", "kd") == "kd":
                    for column, value in row.items():
                        if column in METRICS and isinstance(value, Estimate):
                            shown.setdefault(column, set()).add(round(value.mean, 9))
    assert set(shown) == set(METRICS)
    mean = {"student_acc": 0.86, "student_val_acc": 0.86}  # of three seeds; all else is the same in each
    for name, found in shown.items():
        expected = mean.get(name, cell.metrics[name])
        assert list(found) == [pytest.approx(expected)], name


def test_headings_of_metrics_are_the_declared_ones() -> None:
    for board in (leaderboard(everything()), robustness(everything())):
        for column in (column for table in board.tables for column in table.columns if column.name in METRICS):
            assert column.heading.startswith(METRICS[column.name].heading)
            assert column.about == METRICS[column.name].meaning


def test_every_declared_metric_is_measured_somewhere() -> None:
    """In the committed results."""
    folders = (Path(__file__).parent.parent / "results").glob("*/" + records.FILE)
    measured = {name for path in folders for cell in records.read(path.parent) for name in cell.metrics}
    missing = set(METRICS) - measured - NOT_COMMITTED
    assert not missing, f"declared and measured nowhere: {missing}"


# AutoAttack takes hours on a CPU: no committed suite asks for it.
NOT_COMMITTED = {"victim_robust_autoattack", "student_robust_autoattack"}


def test_boards_of_two_scenarios_have_a_section_each() -> None:
    strict = replace(made_up("none", "kd", 0, 0.9).scenario, name="labels", access="label")
    cells = over_seeds("none", "kd", [0.9] * 2) + over_seeds("nasty", "kd", [0.8] * 2)
    cells += over_seeds("none", "kd", [0.7] * 2, scenario=strict) + over_seeds(
        "nasty", "kd", [0.65] * 2, scenario=strict
    )
    found = {(row["scenario"], row["defense"]): row["protection"] for row in rows(leaderboard(cells), "ranking")}
    assert found["default", "nasty"] == Estimate(0.1, 0.0, 2)
    assert found["labels", "nasty"] == Estimate(0.05, 0.0, 2)
    assert "Ranking: scenario labels" in render(leaderboard(cells), "md")
