"""Sweeps: which methods make one, which field is the axis, and in what order its values stand."""

from dataclasses import replace

from made_up_curves import record

from kdbench.board.intervals import Estimate
from kdbench.board.sweeps import sweeps


def test_one_field_that_varies_is_a_sweep_in_ascending_order() -> None:
    [swept] = sweeps("defense", [record("nasty", omega=w, tau=4.0) for w in (0.1, 0.004, 2, 0.01)])
    assert (swept.role, swept.method, swept.field, swept.other) == ("defense", "nasty", "omega", None)
    assert swept.values == [0.004, 0.01, 0.1, 2.0]
    assert swept.others == [None]
    assert swept.name == "nasty-omega"


def test_of_two_fields_the_one_with_more_values_is_the_axis() -> None:
    grid = [record("kd", alpha=a, temperature=T) for a in (0.9, 0.1) for T in (20.0, 1.0, 4.0)]
    [swept] = sweeps("attack", grid)
    assert (swept.field, swept.other) == ("temperature", "alpha")
    assert swept.values == [1.0, 4.0, 20.0]
    assert swept.others == [0.1, 0.9]
    assert swept.name == "kd-temperature"
    assert swept.methods[4.0, 0.1] == record("kd", alpha=0.1, temperature=4.0)


def test_two_fields_that_vary_together_are_one_axis() -> None:
    methods = [record("kd", temperature=t, lr=0.1 * t) for t in (20.0, 1.0, 4.0)]
    [swept] = sweeps("attack", methods)
    assert (swept.field, swept.others) == ("temperature", [None])
    assert list(swept.methods) == [(t, None) for t in (20.0, 1.0, 4.0)]


def test_none_and_three_fields_that_vary_are_no_sweep() -> None:
    assert sweeps("attack", [record("kd", temperature=4.0), replace(record("kd", temperature=4.0), name="other")]) == []
    corner = {"a": 1, "b": 1, "c": 1}
    cube = [record("kd", **corner), *(record("kd", **(corner | {name: 2})) for name in corner)]
    assert sweeps("attack", cube) == []
    assert sweeps("attack", []) == []


def test_methods_are_swept_apart_and_by_their_names() -> None:
    methods = [record(m, x=x) for m in ("b", "a") for x in (1, 2)] + [record("c", x=1), record("d", y=3)]
    assert [swept.name for swept in sweeps("defense", methods)] == ["a-x", "b-x"]


def test_a_list_stands_at_its_length_and_words_after_numbers() -> None:
    [swept] = sweeps("attack", [record("scm", steps=[1] * n) for n in (3, 0, 2)])
    assert swept.values == [0.0, 2.0, 3.0]
    [swept] = sweeps("attack", [record("kd", decay=value) for value in ("step", 2, "cosine", 0.5, True)])
    assert swept.values == [0.5, 2.0, "True", "cosine", "step"]


def test_methods_that_would_share_a_place_are_no_sweep() -> None:
    assert sweeps("attack", [record("scm", steps=steps) for steps in ([1, 2], [3, 4], [1, 2, 3])]) == []
    longer = replace(record("nasty", omega=0.1), name="longer", recipe={"epochs": 9})
    assert sweeps("defense", [record("nasty", omega=0.1), record("nasty", omega=0.2), longer]) == []


def test_a_hole_in_a_grid_is_no_value() -> None:
    [swept] = sweeps("attack", [record("kd", T=T, alpha=a) for T, a in ((1, 0.1), (2, 0.1), (3, 0.1), (3, 0.9))])
    assert swept.along(0.1, lambda name: Estimate(0.5, None, 1)) == [Estimate(0.5, None, 1)] * 3
    assert swept.along(0.9, lambda name: Estimate(0.5, None, 1)) == [None, None, Estimate(0.5, None, 1)]
