"""Curves and network figures in the report: which are shown, where, and under what names."""

from collections.abc import Iterable
from pathlib import Path

from made_up_cells import write_cells
from made_up_curves import assistants, attackers, omegas, sizes

from kdbench.board import report
from kdbench.board.plots import drawing
from kdbench.board.plots.drawing import Plot
from kdbench.board.studies import Studies
from kdbench.runs.network_figures import FIGURES


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
