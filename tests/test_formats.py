"""The formats of a board: they can be read back, name everything, and escape what comes from outside."""

import csv
import json
from io import StringIO

import pytest
from made_up_cells import leaderboard, matrix, over_seeds, robustness, rows

from kdbench.board.formats.rendering import FORMATS, render
from kdbench.board.intervals import Estimate
from kdbench.errors import KdbenchError


def test_formats_can_be_read_back() -> None:
    board = leaderboard(matrix())
    for row, line in zip(rows(board, "ranking"), csv.DictReader(StringIO(render(board, "csv"))), strict=True):
        protection = row["protection"]
        assert isinstance(protection, Estimate)
        assert line["defense"] == row["defense"]
        assert float(line["protection"]) == pytest.approx(protection.mean, abs=1e-6)
        assert float(line["protection_half_width"]) == pytest.approx(protection.half_width, abs=1e-6)
        assert line["protection_n"] == "3"
    content = json.loads(render(board, "json"))
    assert content["schema"] == 2
    assert content["seeds"] == [0, 1, 2]
    assert {row["defense"] for row in content["tables"]["ranking"]} == {"none", "nasty", "stingy"}
    assert set(content["columns"]) == set(content["tables"])
    for name, table in content["tables"].items():
        assert all(set(row) == set(content["columns"][name]) for row in table)
    assert "<table" in render(board, "html")


def test_every_format_names_every_defense() -> None:
    for board in (leaderboard(matrix()), robustness(matrix())):
        for format in (found.name for found in FORMATS):
            assert all(label in render(board, format, 160) for label in ("none", "nasty", "stingy"))


def test_a_terminal_line_is_no_longer_than_the_terminal() -> None:
    for width in (80, 100, 160):
        assert max(len(line) for line in render(leaderboard(matrix()), "table", width).splitlines()) <= width


def test_labels_cannot_break_a_table() -> None:
    cells = over_seeds("a|b", "<i>[bold]", [0.8] * 3)
    board = leaderboard(cells)
    assert "a\\|b" in render(board, "md")
    assert "<i>" not in render(board, "html")
    assert "[bold]" in render(board, "table", 160)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(KdbenchError, match=r"no format 'jsn'. Did you mean 'json'"):
        render(leaderboard(matrix()), "jsn")


def test_columns_leave_a_narrow_terminal_in_their_order() -> None:
    board = leaderboard(matrix())
    wide, narrow = render(board, "table", 400), render(board, "table", 80)
    assert "Its parameters" in wide
    assert "Its parameters" not in narrow
    assert "Utility" in narrow


def test_json_rounds_to_six_digits_and_describes_every_column() -> None:
    content = json.loads(render(leaderboard(over_seeds("none", "kd", [0.1234567, 0.1234567])), "json"))
    [row] = content["tables"]["ranking"]
    assert row["student_acc"] == {"mean": 0.123457, "half_width": 0.0, "n": 2}
    assert all(content["columns"]["ranking"].values())
