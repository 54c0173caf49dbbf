"""The layout of curves: no text is cut off or overlaps, and the same cells give the same bytes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_up_cells import files
from made_up_curves import (
    assistants,
    attack_runs,
    attackers,
    drawn,
    omegas,
    querying,
    record,
    seen_ticks,
    sizes,
)
from matplotlib import style
from matplotlib.figure import Figure

from kdbench.board.plots import drawing
from kdbench.board.plots.style import STYLE
from kdbench.board.studies import Studies
from kdbench.records import Cell


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
