"""A study: protection, utility loss, gain, the strongest attack and ranks, on made-up cells."""

import pytest
from made_up_cells import NO_DATA, by_name, ended, leaderboard, made_up, only, over_seeds, rows

from kdbench.board.formats.rendering import render
from kdbench.board.intervals import Estimate
from kdbench.board.study import RankStatus
from kdbench.board.warnings import warnings
from kdbench.records import Status, SubsetRecord

T_2 = 4.302652729749462  # 97.5 % quantile of Student's t with 2 degrees of freedom, from a printed table: 4.303


def test_protection_is_the_same_attack_on_none_minus_here() -> None:
    cells = over_seeds("none", "kd", [0.90, 0.92, 0.94]) + over_seeds("nasty", "kd", [0.80, 0.84, 0.80])
    found = only(cells)
    protection = found.protection(found.pairings["nasty", "kd"])
    assert protection is not None
    assert protection.mean == pytest.approx(0.32 / 3)
    assert protection.half_width == pytest.approx(T_2 * (84 / 90000) ** 0.5 / 3**0.5)
    assert by_name(cells)["nasty"].protection == protection
    assert by_name(cells)["none"].protection == Estimate(0.0, 0.0, 3)


def test_a_seed_that_failed_on_one_side_is_left_out_of_the_pair() -> None:
    on_none = over_seeds("none", "kd", [0.90, 0.50, 0.94])
    on_none[1:2] = ended(on_none[1:2], Status.FAILED, "training diverged")
    cells = on_none + over_seeds("nasty", "kd", [0.80, 0.99, 0.80])
    protection = by_name(cells)["nasty"].protection
    assert protection is not None
    assert protection.n == 2
    assert protection.mean == pytest.approx((0.10 + 0.14) / 2)


def test_utility_loss_is_paired_by_seed() -> None:
    cells = over_seeds("none", "kd", [0.9, 0.9])
    cells += [made_up("nasty", "kd", seed, 0.8, victim_acc=acc) for seed, acc in enumerate([0.95, 0.93])]
    loss = only(cells).utility_loss("nasty")
    assert loss is not None
    assert loss.mean == pytest.approx(0.02)
    assert loss.n == 2


def test_the_strongest_attack_is_chosen_on_validation_data_and_told_by_its_test_accuracy() -> None:
    cells = over_seeds("none", "kd", [0.9] * 3)
    cells += over_seeds("nasty", "kd", [0.85] * 3, val=0.80) + over_seeds("nasty", "tuned", [0.82] * 3, val=0.84)
    row = by_name(cells)["nasty"]
    assert row.strongest is not None
    assert row.strongest.attack.name == "tuned"
    (row,) = [row for row in rows(leaderboard(cells), "ranking") if row["defense"] == "nasty"]
    assert row["student_acc"] == Estimate(0.82, 0.0, 3)
    assert row["protection"] == Estimate(0.08, 0.0, 3)


def test_an_attack_that_bypassed_the_defense_is_not_scored_on_either_side() -> None:
    strong = {"none": 0.95, "stingy": 0.95}
    cells = [c for d, acc in strong.items() for c in over_seeds(d, "inversion", [acc] * 3)]
    cells = cells[:3] + ended(cells[3:], Status.BYPASSED)
    cells += over_seeds("none", "kd", [0.90] * 3) + over_seeds("stingy", "kd", [0.85] * 3)
    row = by_name(cells)["stingy"]
    assert row.strongest is not None
    assert row.strongest.attack.name == "kd"
    # 0.10 would credit the defense with an inversion that it did nothing against
    assert row.protection == Estimate(0.05, 0.0, 3)
    assert "bypassed: inversion" in warnings(row)
    (row,) = [r for r in rows(leaderboard(cells), "attacks") if (r["defense"], r["attack"]) == ("stingy", "inversion")]
    assert row["student_acc"] is None
    assert row["bypassed_acc"] == Estimate(0.95, 0.0, 3)
    assert any("'bypassed'" in note for note in leaderboard(cells).notes)


def test_a_defense_that_no_adaptive_attack_was_scored_against_has_a_warning() -> None:
    cells = over_seeds("none", "kd", [0.9] * 3)
    cells += over_seeds("nasty", "kd", [0.8] * 3) + over_seeds("stingy", "kd", [0.8] * 3)
    cells += over_seeds("nasty", "tuned", [0.7] * 3)
    cells += ended(over_seeds("stingy", "tuned", [0.7] * 3), Status.FAILED, "out of memory")
    marks = {name: warnings(row) for name, row in by_name(cells).items()}
    assert marks == {"none": [], "nasty": [], "stingy": ["no adaptive attack run", "failed: 3"]}


def test_a_defense_outside_the_tolerance_stands_below_the_line() -> None:
    cells = over_seeds("none", "kd", [0.90] * 3)
    cells += over_seeds("nasty", "kd", [0.10] * 3, victim_acc=0.93)
    cells += over_seeds("stingy", "kd", [0.85] * 3, victim_acc=0.94)
    found = by_name(cells)
    assert list(found) == ["stingy", "none", "nasty"]
    assert [row.rank for row in found.values()] == [1, 2, None]
    assert found["stingy"].status is RankStatus.RANKED  # a loss of exactly the tolerance is inside
    assert found["nasty"].status is RankStatus.ABOVE_TOLERANCE
    lines = render(leaderboard(cells), "md").splitlines()
    line = next(index for index, text in enumerate(lines) if "below the line: utility loss above 2 points" in text)
    assert "nasty" in lines[line + 1]


def test_defenses_are_sorted_by_rank_then_protection_then_name() -> None:
    cells = over_seeds("none", "kd", [0.9, 0.9, 0.9])
    for defense in ("b", "a"):
        cells += over_seeds(defense, "kd", [0.80, 0.82, 0.81])
    cells += over_seeds("c", "kd", [0.79, 0.81, 0.83])
    cells += over_seeds("d", "kd", [0.70, 0.70, 0.70])
    found = by_name(cells)
    assert list(found) == ["d", "a", "b", "c", "none"]
    assert [row.rank for row in found.values()] == [1, 2, 2, 2, 5]


def test_gain_is_over_the_baseline_that_validation_chose_on_the_same_data_subset() -> None:
    tenth = SubsetRecord(0.1, 4)
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
    chosen = {(row["baseline"], row["fraction"]): row["chosen"] for row in rows(leaderboard(cells), "baselines")}
    assert chosen == {("cross-entropy", 1): False, ("label-smoothing", 1): True, ("cross-entropy", 0.1): True}


def test_an_attacker_without_data_is_compared_with_guessing() -> None:
    found = only(over_seeds("none", "inversion", [0.65, 0.75], subset=NO_DATA))
    gain = found.gain(found.pairings["none", "inversion"])
    assert gain is not None
    assert gain.mean == pytest.approx(0.6)


def test_gain_over_labels_is_over_the_labels_only_attack_of_the_same_defense_and_data() -> None:
    cells = over_seeds("nasty", "kd", [0.80, 0.82]) + over_seeds("nasty", "hard-label", [0.78, 0.79])
    cells += over_seeds("nasty", "partial", [0.8, 0.8], subset=SubsetRecord(0.1, 0))
    found = only(cells)
    gain = found.gain_over_labels(found.pairings["nasty", "kd"])
    assert gain is not None
    assert gain.mean == pytest.approx((0.02 + 0.03) / 2)
    assert found.gain_over_labels(found.pairings["nasty", "partial"]) is None
    assert found.gain_over_labels(found.pairings["nasty", "hard-label"]) is None
