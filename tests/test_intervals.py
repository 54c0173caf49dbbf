"""Intervals, paired differences, ranks and Pareto fronts: every number can be checked by hand."""

import pytest

from kdbench.board.comparisons import pareto_front, ranks
from kdbench.board.intervals import Estimate, estimate, paired

T_2 = 4.302652729749462  # 97.5 % quantile of Student's t with 2 degrees of freedom, from a printed table: 4.303


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


def test_a_front_holds_what_no_other_point_beats_at_the_same_cost_or_less() -> None:
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 2.0), (2.0, 4.0), (2.0, 3.0), (4.0, 5.0)]
    assert pareto_front(points) == [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]
    assert pareto_front([]) == []


def test_only_an_interval_wholly_on_one_side_of_0_is_sure() -> None:
    sure = {0.2: (True, False), -0.2: (False, True), 0.1: (False, False), -0.1: (False, False)}
    for mean, (above, below) in sure.items():
        found = Estimate(mean, 0.1, 3)
        assert (found.surely_above_0, found.surely_below_0) == (above, below)
    assert not Estimate(0.2, None, 1).surely_above_0
    assert not Estimate(-0.2, None, 1).surely_below_0
