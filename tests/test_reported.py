"""Ours beside theirs: each reported number once, beside what was measured here, and nothing where papers say nothing."""

import csv
import json
from collections.abc import Iterable
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from made_up_cells import ended, leaderboard, over_seeds, rows

from kdbench.board.document import Value
from kdbench.board.formats.csv import csv as write_csv
from kdbench.board.formats.rendering import render
from kdbench.board.intervals import Estimate, estimate
from kdbench.board.tables.reported import NOTE
from kdbench.records import Cell, ReportedNumber, Status, SubsetRecord

STUDENT = ReportedNumber("student_acc", 0.75, "table 1", "paper")
VICTIM = ReportedNumber("victim_acc", 0.95, "table 2", "code")
ALONE = ReportedNumber("student_acc", 0.8664, "table 3", "memory")


def reported() -> list[Cell]:
    """`nasty` against two attacks and a baseline, with a number for the victim, for one attack_run, and for the baseline."""
    cells = over_seeds("nasty", "kd", [0.70, 0.72, 0.74], reported=(STUDENT, VICTIM))
    cells += over_seeds("nasty", "tuned", [0.80, 0.81, 0.82], reported=(VICTIM,))
    return cells + over_seeds(None, "cross-entropy", [0.88, 0.90, 0.89], reported=(ALONE,))


def beside(cells: Iterable[Cell]) -> dict[tuple[Any, ...], dict[str, Value]]:
    """The rows of the table by defense, attack and source."""
    found = rows(leaderboard(cells), "reported")
    by_name = {(row["defense"], row["attack"], row["source"]): row for row in found}
    assert len(by_name) == len(found)
    return by_name


def test_an_attack_run_a_victim_and_a_baseline_stand_beside_reported_numbers() -> None:
    found = beside(reported())
    assert set(found) == {
        ("nasty", "kd", "table 1"),
        ("nasty", "the victim", "table 2"),
        ("no-query baseline", "cross-entropy", "table 3"),
    }
    attack_run, victim, alone = (found[key] for key in sorted(found))
    assert attack_run["ours"] == estimate({0: 0.70, 1: 0.72, 2: 0.74})
    assert attack_run["theirs"] == Estimate(0.75, None, 1)
    assert victim["ours"] == Estimate(0.96, 0.0, 3)
    assert victim["theirs"] == Estimate(0.95, None, 1)
    assert alone["ours"] == estimate({0: 0.88, 1: 0.90, 2: 0.89})


def test_the_difference_is_ours_minus_theirs_with_our_interval() -> None:
    for row in beside(reported()).values():
        ours, theirs, difference = row["ours"], row["theirs"], row["difference"]
        assert isinstance(ours, Estimate)
        assert isinstance(theirs, Estimate)
        assert isinstance(difference, Estimate)
        assert difference.mean == pytest.approx(ours.mean - theirs.mean)
        assert (difference.half_width, difference.n) == (ours.half_width, ours.n)


def test_a_number_from_memory_is_unverified_and_other_evidence_is_named() -> None:
    assert {key[2]: row["evidence"] for key, row in beside(reported()).items()} == {
        "table 1": "paper",
        "table 2": "code",
        "table 3": "unverified",
    }


def test_a_number_of_what_was_not_scored_stands_alone() -> None:
    cells = ended(over_seeds("nasty", "kd", [0.7] * 3, reported=(STUDENT,)), Status.FAILED, "training diverged")
    [row] = beside(cells).values()
    assert (row["ours"], row["difference"]) == (None, None)
    assert row["theirs"] == Estimate(0.75, None, 1)
    assert "| nasty | kd | – | 75.0 | – | paper | table 1 |" in render(leaderboard(cells), "md")


def test_a_victim_is_known_though_the_last_attack_on_it_was_not_made_up() -> None:
    skipped = ended(over_seeds("nasty", "zealous", [0.7] * 3, reported=(VICTIM,)), Status.SKIPPED, "needs weights")
    found = beside([*reported(), *skipped])
    assert found["nasty", "the victim", "table 2"]["ours"] == Estimate(0.96, 0.0, 3)


def test_two_numbers_of_one_source_are_two_rows() -> None:
    last, best = replace(STUDENT, value=0.74), replace(STUDENT, value=0.76)
    found = rows(leaderboard(over_seeds("nasty", "kd", [0.7] * 3, reported=(last, best))), "reported")
    assert [row["theirs"] for row in found] == [Estimate(0.74, None, 1), Estimate(0.76, None, 1)]


def test_a_baseline_is_compared_where_it_had_most_data() -> None:
    tenth = over_seeds(None, "cross-entropy", [0.5] * 3, reported=(ALONE,), subset=SubsetRecord(0.1, 0))
    for cells in (reported() + tenth, tenth + reported()):
        assert beside(cells)["no-query baseline", "cross-entropy", "table 3"]["ours"] == estimate(
            {0: 0.88, 1: 0.90, 2: 0.89}
        )


def test_each_student_has_its_own_numbers() -> None:
    small = over_seeds("nasty", "kd", [0.70] * 3, reported=(STUDENT,))
    tiny = over_seeds("nasty", "kd", [0.60] * 3, reported=(replace(STUDENT, value=0.65),), student="tiny")
    found = {row["student"]: row["theirs"] for row in rows(leaderboard(small + tiny), "reported")}
    assert found == {"small": Estimate(0.75, None, 1), "tiny": Estimate(0.65, None, 1)}
    assert render(leaderboard(small + tiny), "md").count("-5.0 ± 0.0") == 2


def test_without_numbers_there_is_no_table_and_no_note() -> None:
    silent = [replace(cell, reported=()) for cell in reported()]
    board = leaderboard(silent)
    assert "reported" not in {table.name for table in board.tables}
    assert NOTE not in board.notes
    assert "ReportedNumber" not in render(board, "md")
    assert leaderboard(reported()).notes.count(NOTE) == 1


def test_markdown_has_percent_and_signed_points() -> None:
    text = render(leaderboard(reported()), "md")
    head = "| Defense | Attack | Ours (%) | Reported (%) | Difference (points) | Evidence | Source |"
    assert head in text
    assert "| nasty | kd | 72.0 ± 5.0 | 75.0 | -3.0 ± 5.0 | paper | table 1 |" in text
    assert "| nasty | the victim | 96.0 ± 0.0 | 95.0 | +1.0 ± 0.0 | code | table 2 |" in text
    assert "| no-query baseline | cross-entropy | 89.0 ± 2.5 | 86.6 | +2.4 ± 2.5 | unverified | table 3 |" in text


def test_json_and_csv_have_fractions_in_full() -> None:
    board = leaderboard(reported())
    content = json.loads(render(board, "json"))
    from_json = {(row["defense"], row["attack"]): row for row in content["tables"]["reported"]}
    alone = from_json["no-query baseline", "cross-entropy"]
    assert alone["theirs"] == {"mean": 0.8664, "half_width": None, "n": 1}
    assert alone["difference"]["mean"] == pytest.approx(0.0236)
    assert alone["evidence"] == "unverified"
    assert set(content["columns"]["reported"]) == set(alone)
    lines = {(line["defense"], line["attack"]): line for line in csv.DictReader(StringIO(write_csv(board, "reported")))}
    assert len(lines) == 3
    assert float(lines["nasty", "kd"]["difference"]) == pytest.approx(-0.03)
    assert lines["nasty", "kd"]["theirs_half_width"] == ""
