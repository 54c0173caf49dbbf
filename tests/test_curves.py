"""Curves: which are offered, and what their axes, lines and legends show."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_up_cells import ended, matrix, only
from made_up_curves import (
    OMEGAS,
    assistants,
    attackers,
    bars,
    drawn,
    legend,
    numbers,
    omegas,
    panels,
    percent,
    plain_lines,
    querying,
    record,
    sizes,
    ticks,
    ys,
)

from kdbench.board.intervals import estimate
from kdbench.board.plots import curves, drawing
from kdbench.board.studies import Studies
from kdbench.records import Status


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (omegas, ["nasty-omega"]),
        (assistants, ["assistant-temperature"]),
        (attackers, ["kd-temperature"]),
        (querying, ["queries"]),
        (sizes, ["students"]),
        (matrix, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_curves_are_offered_by_name_where_there_is_one(cells: Any, names: list[str]) -> None:
    rest = ("student-accuracy", "protection", "trade-off", "adversarial-accuracy", "transfer")
    assert [plot.name for plot in drawing.plots(Studies.of(cells())) if not plot.name.startswith(rest)] == names


def test_each_student_has_curves_of_its_own() -> None:
    cells = omegas() + [replace(cell, student="zoo:tiny") for cell in omegas()]
    assert {"nasty-omega-small", "nasty-omega-zoo-tiny"} <= {plot.name for plot in drawing.plots(Studies.of(cells))}


def test_a_sweep_that_failed_as_a_whole_is_not_offered() -> None:
    failed = [ended([c], Status.FAILED, "diverged")[0] if c.defense and c.defense.fields else c for c in omegas()]
    assert "nasty-omega" not in [plot.name for plot in drawing.plots(Studies.of(failed))]


def test_along_one_field_of_a_defense_stand_what_is_served_and_each_attack() -> None:
    cells, figure = omegas(), drawn(omegas(), "nasty-omega")
    served, students = panels(figure).values()
    assert list(panels(figure)) == ["Accuracy as served (%)", "Student accuracy (%)"]
    assert ticks(served) == ticks(students) == ["0.004", "0.01", "0.04", "0.1"]
    assert ys(served, "victim") == pytest.approx([94, 95, 96, 94])
    found = only(cells)
    for attack in ("kd", "hard-label"):
        labels = [f"nasty+omega-{omega}+tau-4.0" for omega in OMEGAS]
        expected = [found.pairings[label, attack].mean("student_acc") for label in labels]
        assert ys(students, attack) == percent(expected)
    assert legend(figure) == ["victim", "hard-label", "kd", "undefended", "no-query baseline"]


def test_bars_are_intervals_and_what_does_not_vary_is_dashed_and_has_a_band() -> None:
    served, students = panels(drawn(omegas(), "nasty-omega")).values()
    [upper] = bars(students)["kd"].lines[2]
    last = estimate({seed: 0.75 + 0.03 * seed for seed in range(3)})
    assert last is not None
    assert last.half_width is not None
    assert upper.get_segments()[-1][:, 1] == pytest.approx([100 * last.low, 100 * last.high])
    for ax, label, value in ((served, "undefended", 97.0), (students, "no-query baseline", 81.0)):
        line = plain_lines(ax)[label]
        assert line.is_dashed()
        assert ys(ax, label) == pytest.approx([value] * len(OMEGAS))
        assert len(ax.collections) == len(bars(ax)) + 1, "a band beside the bars"
    assert not any(bar.lines[0] is not None and bar.lines[0].is_dashed() for bar in bars(students).values())


def test_a_label_looks_alike_in_all_panels_and_like_no_other() -> None:
    seen: dict[tuple[Any, str], str] = {}
    looks: dict[str, set[tuple[Any, str]]] = {}
    for cells, name in ((omegas(), "nasty-omega"), (assistants(), "assistant-temperature")):
        seen.clear()
        looks.clear()
        for ax in panels(drawn(cells, name)).values():
            for label, bar in bars(ax).items():
                assert bar.lines[0] is not None
                look = bar.lines[0].get_color(), str(bar.lines[0].get_marker())
                looks.setdefault(label, set()).add(look)
                assert seen.setdefault(look, label) == label
        assert all(len(own) == 1 for own in looks.values())


def test_two_fields_of_a_defense_make_a_line_for_each_value_of_the_second() -> None:
    figure = drawn(assistants(), "assistant-temperature")
    found = panels(figure)
    assert list(found) == [
        "Accuracy as served (%)",
        "Student accuracy, strongest attack (%)",
        "Accuracy under FGSM (%)",
        "Accuracy under PGD (%)",
        "Sensitivity of the victim",
        "C&W L2 of the victim",
    ]
    assert all(ticks(ax) == ["1", "4", "20"] for ax in found.values())
    assert legend(figure) == ["distillations 1", "distillations 2", "undefended"]
    assert ys(found["Student accuracy, strongest attack (%)"], "distillations 2") == pytest.approx([89.0] * 3)
    assert ys(found["Accuracy under PGD (%)"], "distillations 2") == pytest.approx([34, 46, 110])
    assert ys(found["Accuracy under PGD (%)"], "undefended") == pytest.approx([30.0] * 3)
    assert ys(found["C&W L2 of the victim"], "distillations 1") == pytest.approx([0.9, 1.2, 2.8])
    assert ys(found["Sensitivity of the victim"], "distillations 1") == pytest.approx([0.049, 0.046, 0.03])


def test_along_two_fields_of_an_attack_there_is_a_panel_for_each_value_of_the_second() -> None:
    figure = drawn(attackers(), "kd-temperature")
    found = panels(figure)
    assert list(found) == ["Student accuracy (%), alpha 0.1", "Student accuracy (%), alpha 0.9"]
    assert legend(figure) == ["none", "nasty", "no-query baseline, same data"]
    for alpha, ax in zip((0.1, 0.9), found.values(), strict=True):
        assert ticks(ax) == ["1", "4", "20"]
        assert ys(ax, "nasty") == pytest.approx([100 * (0.81 - 0.001 * T * alpha) for T in (1, 4, 20)])
        assert ys(ax, "no-query baseline, same data") == pytest.approx([81.0] * 3)
        assert plain_lines(ax)["no-query baseline, same data"].is_dashed()
    assert len({ax.get_ylim() for ax in found.values()}) == 1, "what is the same measure has the same scale"


def test_a_hole_in_the_numbers_leaves_its_neighbours_in_their_places() -> None:
    gone = record("kd", temperature=4.0, alpha=0.1).name
    cells = [ended([c], Status.FAILED, "diverged")[0] if c.attack.name == gone else c for c in attackers()]
    ax = panels(drawn(cells, "kd-temperature"))["Student accuracy (%), alpha 0.1"]
    line = bars(ax)["nasty"].lines[0]
    assert line is not None
    assert [round(x) for x in numbers(line.get_xdata())] == [0, 2]


def test_a_bypassed_attack_is_drawn_as_what_the_attacker_has() -> None:
    cells = [ended([c], Status.BYPASSED)[0] if c.defense and c.defense.fields else c for c in omegas()]
    students = panels(drawn(cells, "nasty-omega"))["Student accuracy (%)"]
    assert ys(students, "kd") == pytest.approx([90, 86, 82, 78])


def test_one_seed_has_neither_bars_nor_bands() -> None:
    for ax in panels(drawn([cell for cell in omegas() if cell.seed == 0], "nasty-omega")).values():
        for bar in bars(ax).values():
            assert all(low == high for [[_, low], [_, high]] in bar.lines[2][0].get_segments())
        [band] = [shape for shape in ax.collections if not any(shape in bar.lines[2] for bar in bars(ax).values())]
        assert len(np.unique(np.asarray(band.get_paths()[0].vertices)[:, 1])) == 1


def test_only_attacks_are_drawn_that_none_beats_with_as_many_queries() -> None:
    figure = drawn(querying(), "queries")
    [ax] = figure.axes
    lines = plain_lines(ax)
    assert legend(figure) == list(lines) == ["none", "nasty"]
    for label, loss in (("none", 0), ("nasty", 10)):
        assert numbers(lines[label].get_xdata()) == [100, 1000, 5000]
        assert ys(ax, label) == pytest.approx([50 - loss, 70 - loss, 80 - loss])
    assert ax.get_xscale() == "log"


def test_a_budget_is_marked_and_said() -> None:
    [plain_ax] = drawn(querying(), "queries").axes
    assert "budget" not in plain_ax.get_xlabel()
    limited = [replace(cell, scenario=replace(cell.scenario, budget=6000)) for cell in querying()]
    [ax] = drawn(limited, "queries").axes
    assert [numbers(line.get_xdata()) for line in ax.get_lines()][2:] == [[6000, 6000]]
    assert "budget" in ax.get_xlabel()


def test_where_all_query_alike_there_is_no_curve_of_queries() -> None:
    alike = [replace(cell, metrics=cell.metrics | {"queries": 7}) for cell in querying()]
    assert not curves.has_query_counts(only(alike))
    assert "queries" not in [plot.name for plot in drawing.plots(Studies.of(alike))]
    several = [
        replace(c, metrics=c.metrics | {"queries": 7 + 3 * (c.defense.name == "none")}) for c in querying() if c.defense
    ]
    assert not curves.has_query_counts(only(several)), "what differs between defenses is no choice of the attacker"


def test_students_stand_in_the_order_of_their_weights() -> None:
    figure = drawn(sizes(), "students")
    [ax] = figure.axes
    assert ticks(ax) == ["b-small\n100 weights", "c-middle\n1,000 weights", "a-large\n9,000 weights"]
    assert ys(ax, "none") == pytest.approx([71, 81, 91]), "the strongest attack"
    assert ys(ax, "nasty") == pytest.approx([61, 71, 81])
    assert ys(ax, "no-query baseline, all data") == pytest.approx([50, 60, 70])
    assert legend(figure) == ["none", "nasty", "no-query baseline, all data"]
    assert "5,000 weights" in ax.get_xlabel()
    assert any("student of 3 sizes" in text.get_text() for text in figure.texts)


def test_students_of_one_size_make_no_curve() -> None:
    alike = [replace(cell, metrics=cell.metrics | {"student_parameters": 100}) for cell in sizes()]
    assert "students" not in [plot.name for plot in drawing.plots(Studies.of(alike))]
    unknown = [replace(cell, student=name) for name in ("a", "b") for cell in omegas()]
    assert "students" not in [plot.name for plot in drawing.plots(Studies.of(unknown))]
