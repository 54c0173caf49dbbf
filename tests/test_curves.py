"""Sweeps and curves: which methods make one, what stands on the axes, and which figures the report shows."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_cells import ended, files, matrix, only, over_seeds, write_cells
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import ArrayLike

from kdbench.board import report
from kdbench.board.intervals import Estimate, estimate
from kdbench.board.plots import curves, drawing
from kdbench.board.plots.drawing import Plot
from kdbench.board.plots.style import STYLE
from kdbench.board.studies import Studies
from kdbench.board.sweeps import sweeps
from kdbench.records import AttackRecord, Cell, DefenseRecord, MethodRecord, Status
from kdbench.runs.network_figures import FIGURES

SERVED = [0.94, 0.95, 0.96]
OMEGAS = [0.004, 0.01, 0.04, 0.1]


def record(method: str, **fields: Any) -> MethodRecord:
    """A method under a label that says its fields."""
    return MethodRecord(
        "+".join([method, *(f"{name}-{value}" for name, value in fields.items())]), method, fields, "made up"
    )


def attack_runs(defense: MethodRecord, attack: MethodRecord, accs: Iterable[float], **changes: Any) -> list[Cell]:
    """One cell a seed."""
    against = DefenseRecord(**vars(defense), is_reference=defense.method == "none")
    by = AttackRecord(**vars(attack))
    cells = over_seeds(defense.name, attack.name, accs, **changes)
    return [replace(cell, defense=against, attack=by) for cell in cells]


def robust(strength: float) -> dict[str, float]:
    return {
        "victim_robust_fgsm": 0.5 + 0.01 * strength,
        "victim_robust_pgd": 0.3 + 0.02 * strength,
        "victim_cw_l2": 0.8 + 0.1 * strength,
        "victim_sensitivity": 0.05 - 0.001 * strength,
    }


def omegas() -> list[Cell]:
    """Four omegas of `nasty`, and `none`, against two attacks; a baseline."""
    cells = over_seeds(None, "cross-entropy", [0.80, 0.81, 0.82])
    for attack in (record("kd"), record("hard-label")):
        cells += attack_runs(record("none"), attack, [0.90, 0.91, 0.92], victim_acc=0.97)
        for index, omega in enumerate(OMEGAS):
            accs = [0.9 - 0.05 * index + 0.01 * seed * index for seed in range(3)]
            cells += attack_runs(record("nasty", omega=omega, tau=4.0), attack, accs, victim_acc=SERVED[index % 3])
    return cells


def assistants() -> list[Cell]:
    """Three temperatures by two numbers of steps of a defense, evaluated for robustness."""
    cells = [c for a in ("kd", "tuned") for c in attack_runs(record("none"), record(a), [0.9] * 3, more=robust(0))]
    for temperature in (1.0, 4.0, 20.0):
        for steps in (1, 2):
            defense = record("assistant", temperature=temperature, steps=steps)
            cells += attack_runs(defense, record("kd"), [0.9 - 0.01 * steps] * 3, more=robust(temperature * steps))
            cells += attack_runs(defense, record("tuned"), [0.91 - 0.01 * steps] * 3, more=robust(temperature * steps))
    return cells


def attackers() -> list[Cell]:
    """Three temperatures by two alphas of an attack on two defenses; a baseline."""
    cells = over_seeds(None, "cross-entropy", [0.80, 0.81, 0.82])
    for index, defense in enumerate(("none", "nasty")):
        for temperature in (20.0, 1.0, 4.0):
            for alpha in (0.9, 0.1):
                accs = [0.9 - 0.1 * index - 0.001 * temperature * alpha + 0.01 * seed for seed in range(3)]
                cells += attack_runs(record(defense), record("kd", temperature=temperature, alpha=alpha), accs)
    return cells


def querying() -> list[Cell]:
    """Five attackers who make ever more queries; the third is beaten with fewer queries, the fourth with as many."""
    said = {"a": (100, 0.5), "b": (1000, 0.7), "c": (2000, 0.6), "d": (5000, 0.75), "e": (5000, 0.8), "f": (0, 0.9)}
    return [
        cell
        for defense, loss in (("none", 0.0), ("nasty", 0.1))
        for attack, (asked, acc) in said.items()
        for cell in over_seeds(defense, attack, [acc - loss] * 3, more={"queries": asked})
    ]


def sizes() -> list[Cell]:
    """Three students, in the order of their names the largest, the smallest, the middle."""
    cells = []
    for student, weights, acc in (("a-large", 9000, 0.9), ("b-small", 100, 0.7), ("c-middle", 1000, 0.8)):
        more = {"student_parameters": weights, "victim_parameters": 5000}
        for index, defense in enumerate(("none", "nasty")):
            for attack, gain in (("kd", 0.0), ("tuned", 0.01)):
                cells += over_seeds(defense, attack, [acc - 0.1 * index + gain] * 3, more=more, student=student)
        cells += over_seeds(None, "cross-entropy", [acc - 0.2] * 3, more=more, student=student)
    return cells


def drawn(cells: Iterable[Cell], name: str) -> Figure:
    """The figure of that name, as it is drawn."""
    [plot] = [plot for plot in drawing.plots(Studies.of(cells)) if plot.name == name]
    with style.context(["default", STYLE]):
        return plot.figure()


def panels(figure: Figure) -> dict[str, Axes]:
    """The axes by their titles; places without a panel are left out."""
    return {ax.get_title(): ax for ax in figure.axes if ax.axison}


def bars(ax: Axes) -> dict[str, ErrorbarContainer]:
    """Lines with bars by their labels."""
    return {str(bar.get_label()): bar for bar in ax.containers if isinstance(bar, ErrorbarContainer)}


def ys(ax: Axes, label: str) -> list[float]:
    """The values of the line of that label."""
    own = bars(ax)[label].lines[0] if label in bars(ax) else plain_lines(ax)[label]
    assert own is not None
    return numbers(own.get_ydata())


def numbers(data: ArrayLike) -> list[float]:
    return [float(value) for value in np.asarray(data)]


def plain_lines(ax: Axes) -> dict[str, Line2D]:
    """Lines without bars by their labels."""
    return {str(line.get_label()): line for line in ax.get_lines() if not str(line.get_label()).startswith("_")}


def ticks(ax: Axes) -> list[str]:
    return [text.get_text() for text in seen_ticks(ax)]


def seen_ticks(ax: Axes) -> list[Text]:
    """The labels of the horizontal axis, but for those beyond its ends, which matplotlib has too."""
    left, right = ax.get_xlim()
    return [text for text in ax.get_xticklabels() if left <= text.get_position()[0] <= right]


def legend(figure: Figure) -> list[str]:
    [only_one] = figure.legends
    return [text.get_text() for text in only_one.get_texts()]


def percent(values: Iterable[Estimate | None]) -> Any:
    return pytest.approx([100 * value.mean for value in values if value])


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


def wordy() -> list[Cell]:
    """A sweep with one panel, and names as long as they come."""
    cells = [
        cell
        for T in (1.0, 4.0)
        for name in ("none", "adaptive-misinformation", "gradient-redirection", "mad")
        for cell in attack_runs(record(name), record("kd", T=T), [0.8, 0.9])
    ]
    return [replace(c, dataset="tiny-imagenet", victim="preresnet-110", student="preresnet-20") for c in cells]


def wordy_sizes() -> list[Cell]:
    """Four students with long names."""
    names = ("preresnet-20", "preresnet-32", "mobilenetv2", "shufflenetv2")
    return [
        replace(cell, student=name, metrics=cell.metrics | {"student_parameters": 1000.0 * index})
        for index, name in enumerate(names, 1)
        for cell in wordy()
    ]


def many() -> list[Cell]:
    """Twenty defenses under attacks with ten temperatures of many digits."""
    return [
        cell
        for defense in range(20)
        for T in range(10)
        for cell in attack_runs(
            record(f"defense-{defense:02}"), record("kd", temperature=1000.5 + T), [0.5 + 0.01 * T] * 2
        )
    ]


def boxes(figure: Figure) -> Iterator[tuple[str, Any]]:
    """All texts of a figure and where they lie, in pixels."""
    with style.context(["default", STYLE]):
        figure.draw_without_rendering()
    for ax in figure.axes:
        yield from ((text.get_text(), text.get_window_extent()) for text in (ax.title, ax.xaxis.label, ax.yaxis.label))
        yield from ((text.get_text(), text.get_window_extent()) for text in seen_ticks(ax))
    yield from ((text.get_text(), text.get_window_extent()) for text in figure.texts)
    yield from ((text.get_text(), text.get_window_extent()) for text in figure.legends[0].get_texts())


CURVES = [
    (omegas, "nasty-omega"),
    (assistants, "assistant-temperature"),
    (attackers, "kd-temperature"),
    (querying, "queries"),
    (sizes, "students"),
]


@pytest.mark.parametrize(
    ("cells", "name"), [*CURVES, (many, "kd-temperature"), (wordy, "kd-T"), (wordy_sizes, "students")]
)
def test_no_word_is_cut_off_or_runs_into_the_panels(cells: Any, name: str) -> None:
    figure = drawn(cells(), name)
    page = figure.bbox
    for words, box in boxes(figure):
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside or not words, f"'{words}' is cut off"
    key = figure.legends[0].get_window_extent()
    assert not any(key.overlaps(text.get_window_extent()) for text in figure.texts), "the head runs into the legend"
    assert not any(key.overlaps(ax.get_window_extent()) for ax in figure.axes)
    for ax in figure.axes:
        own = [text.get_window_extent() for text in seen_ticks(ax) if not text.get_rotation()]
        assert not any(a.overlaps(b) for a, b in pairwise(own)), "two ticks run into each other"


def test_the_same_cells_give_the_same_bytes(tmp_path: Path) -> None:
    for cells, name in CURVES:
        for order, own in (("first", cells()), ("second", reversed(cells()))):
            [plot] = [plot for plot in drawing.plots(Studies.of(own)) if plot.name == name]
            (tmp_path / order).mkdir(exist_ok=True)
            drawing.save(plot, tmp_path / order)
    drawn_first = files(tmp_path / "first")
    assert len(drawn_first) == 2 * len({name for _, name in CURVES})
    assert drawn_first == files(tmp_path / "second")


def drawn_by_hand(folder: Path, names: Iterable[str]) -> str:
    """The report of a folder that has figures of these names."""
    write_cells(omegas(), folder)
    (folder / drawing.FOLDER).mkdir()
    for name in names:
        (folder / drawing.FOLDER / name).write_bytes(b"a figure")
    report.write_all(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_report_shows_curves_among_the_plots(tmp_path: Path) -> None:
    assert "![nasty along omega](plots/nasty-omega.png)" in drawn_by_hand(tmp_path, [])


def test_figures_of_victims_are_shown_where_they_were_drawn(tmp_path: Path) -> None:
    text = drawn_by_hand(tmp_path, ["features-nasty.png", "answers-a b.png", "answers-a b.svg", "inverted-nasty.png"])
    section = text.partition("## Figures\n\n")[2].partition("\n\n## ")[0]
    assert section.split("\n\n") == [
        "![Answers: a b](plots/answers-a%20b.png)",
        "![Features: nasty](plots/features-nasty.png)",
        "![Inverted images: nasty](plots/inverted-nasty.png)",
    ]
    assert text.index("## Plots") < text.index("## Figures") < text.index("## How to read this")


def test_more_than_four_figures_are_folded(tmp_path: Path) -> None:
    names = [f"answers-{index}.png" for index in range(5)]
    four = drawn_by_hand(tmp_path / "four", names[:4]).partition("## Figures\n\n")[2]
    assert four.startswith("![Answers: 0]")
    five = drawn_by_hand(tmp_path / "five", names).partition("## Figures\n\n")[2]
    assert five.startswith("<details><summary>5 figures</summary>\n\n![Answers: 0]")
    body, closed, _ = five.partition("</details>")
    assert closed
    assert body.count("](plots/answers-") == 5


def test_without_figures_there_is_no_section_for_them(tmp_path: Path) -> None:
    text = drawn_by_hand(tmp_path, ["mine.png", "answers.png", "features-only.svg"])
    assert "## Figures" not in text
    assert "mine.png" not in text


def test_the_report_knows_every_figure_that_can_be_drawn() -> None:
    assert list(report.FIGURES) == list(FIGURES)


def test_no_plot_takes_the_name_of_a_figure() -> None:
    shown: list[Plot] = [
        plot for cells in (omegas(), assistants(), attackers(), sizes()) for plot in drawing.plots(Studies.of(cells))
    ]
    assert not [plot.name for plot in shown if plot.name.startswith(tuple(f"{name}-" for name in report.FIGURES))]
