"""The layout of network figures: rows of images, ticks of classes, and data of many classes."""

from pathlib import Path

import numpy as np
import pytest

from kdbench.board.plots import networks
from kdbench.board.plots.networks import ComparedVictims, FeatureMaps, PredictionBars
from kdbench.runs import network_figures

PAIR = ComparedVictims("nasty", "blobs")


def test_at_most_a_thousand_images_are_mapped_and_of_all_classes() -> None:
    """Of a test set that is sorted by class too."""
    chosen = network_figures._choice(10_000)
    assert len(chosen) == len(chosen.unique()) == 1000
    assert len((chosen // 1000).unique()) == 10
    assert network_figures._choice(7).tolist() == list(range(7))


def test_with_few_images_of_a_class_a_row_holds_several_classes() -> None:
    rows = networks._rows(np.arange(20) % 100)
    assert [row.tolist() for row in rows] == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    assert [networks._span(row) for row in rows] == ["0–7", "8–15", "16–19"]


def test_a_row_is_no_longer_than_eight_images_and_all_are_alike() -> None:
    assert [row.tolist() for row in networks._rows(np.arange(5) % 2)] == [[0, 2], [1, 3]]
    assert [len(row) for row in networks._rows(np.arange(64) % 3)] == [8, 8, 8]


@pytest.mark.parametrize("classes", [2, 10, 11, 100, 200, 1000])
def test_classes_are_ticked_so_that_their_numbers_do_not_touch(classes: int) -> None:
    ticks = networks._ticks(classes)
    assert ticks[0] == 0
    assert ticks == [*range(classes)] if classes <= 10 else 3 <= len(ticks) <= 5


@pytest.mark.parametrize("classes", [3, 100])
def test_colour_images_of_many_classes_are_drawn_too(classes: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.random((4, 32, 32, 3)), np.arange(4) % classes
    said = generator.random((1, 4, classes))
    figure = networks.answers(PredictionBars(PAIR, images, labels, (1.0,), said, said, ""))
    figure.savefig(tmp_path / "answers.png")
    assert len(figure.axes) == 4 * 3
    labels = np.arange(300) % classes
    places = generator.random((300, 2))
    figure = networks.features(FeatureMaps(PAIR, labels, places, places, ""))
    figure.savefig(tmp_path / "features.png")
    assert len(figure.axes[0].collections) == classes
    assert bool(figure.legends) == (classes == 3)
