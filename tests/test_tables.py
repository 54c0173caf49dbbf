"""Tables of the boards: each column shows the number that it says, rows stand in order, and values are written plainly."""

from made_up_cells import leaderboard, made_up, matrix, over_seeds, robustness, rows

from kdbench.board.document import Kind, text
from kdbench.board.intervals import Estimate, estimate


def test_each_score_of_an_attack_stands_in_its_own_column() -> None:
    [row] = [r for r in rows(leaderboard(matrix()), "attacks") if (r["defense"], r["attack"]) == ("nasty", "kd")]
    assert row["student_acc"] == estimate({0: 0.85, 1: 0.86, 2: 0.87})
    assert row["protection"] == estimate({0: 0.05, 1: 0.05, 2: 0.05})
    assert row["gain"] == estimate({0: 0.02, 1: 0.06, 2: 0.01})
    assert row["gain_over_labels"] == estimate({0: 0.01, 1: 0.03, 2: 0.05})
    assert row["queries"] == Estimate(1000.0, 0.0, 3)


def test_the_ranking_says_how_many_seeds_a_rank_is_made_of() -> None:
    cells = over_seeds("none", "kd", [0.9] * 4) + over_seeds("nasty", "kd", [0.8] * 2)
    assert {row["defense"]: row["n"] for row in rows(leaderboard(cells), "ranking")} == {"nasty": 2, "none": 4}
    alone = over_seeds("nasty", "kd", [0.8] * 3)
    assert [row["n"] for row in rows(leaderboard(alone), "ranking")] == [3], "without a protection, of the accuracy"


def test_victims_of_one_rank_stand_by_their_worst_adversarial_accuracy() -> None:
    worst = {"none": 0.3, "a": 0.2, "b": 0.4}
    cells = [made_up(name, "kd", 0, 0.8, more={"victim_robust_pgd": value}) for name, value in worst.items()]
    found = rows(robustness(cells), "ranking")
    assert [(row["defense"], row["rank"]) for row in found] == [("b", 1), ("none", 1), ("a", 1)]


def test_in_the_table_for_reading_signs_stand_where_nothing_was_gained_and_at_the_strongest_attack() -> None:
    found = {row["defense"]: row for row in rows(leaderboard(matrix()), "cross")}
    assert found["nasty"]["attack kd"] == "86.0 ± 2.5 ▲"
    assert found["stingy"]["attack kd"] == "81.0 ± 2.5 °"  # the baseline has 83.0
    assert found["stingy"]["attack inversion"] == "bypassed (71.0 ± 2.5)"
    assert found["nasty"]["attack tuned"] == "failed"
    assert found["no-query baseline"]["attack kd"] == "83.0 ± 7.5"


def test_cells_without_a_score_are_listed_with_their_reason_bypassed_ones_too() -> None:
    found = [list(row.values())[2:] for row in rows(leaderboard(matrix()), "missing")]
    assert found == [
        ["bypassed", "inversion", "a reason", "stingy", "0, 1, 2"],
        ["failed", "tuned", "training diverged", "nasty", "0, 1"],
        ["skipped", "tuned", "needs probs", "none", "0, 1"],
    ]


def test_values_are_written_without_a_negative_zero_and_counts_with_their_thousands() -> None:
    assert text(Estimate(-0.0004, 0.0123, 3), Kind.DIFFERENCE) == "+0.0 ± 1.2"
    assert text(Estimate(-0.0004, None, 1), Kind.SHARE) == "0.0"
    assert text(Estimate(12000.0, 0.0, 3), Kind.COUNT) == "12,000"
    assert text(Estimate(0.1234, 0.0456, 3), Kind.NORM) == "0.123 ± 0.05"
    assert [text(value, Kind.TEXT) for value in (None, True, False, 0.5, "a\n b")] == ["–", "yes", "no", "0.5", "a b"]
