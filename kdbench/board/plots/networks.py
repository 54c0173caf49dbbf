"""Figures of what victims do, beside the numbers: their answers, their features, and what was inverted out of them.

Each shows the undefended victim on the left of a defended one, and draws arrays that others have gathered.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdbench.board.plots.style import ACCENT, EMPTY, INK, LETTER, LINE, MUTED, QUIET, canvas, head

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]

PHOTO, BARS, ROW = 1.0, 2.0, 1.15  # inches: an image, a bar chart, the height of a row of both
MAP, SHEET = 4.0, 4.2  # inches: the side of a map of features, the width of a sheet of images
MARGIN = 0.4  # inches around the panels
NAMED = 20  # classes that a legend can name
MARKERS = "os^Dv"  # classes of similar colours have different ones
CHUNK = 8  # images in a row of a sheet, at most
GAP = 0.06  # between the images of a sheet, as a share of one


@dataclass(frozen=True)
class ComparedVictims:
    """Which defense a figure compares with none, and what was run (`about`), for its head."""

    defense: str
    about: str


@dataclass(frozen=True)
class PredictionBars:
    """What two services answer to the same images (N,H,W) or (N,H,W,3) with labels (N,): probabilities (T,N,K), one (N,K) a
    temperature."""

    pair: ComparedVictims
    images: Floats
    labels: Labels
    temperatures: tuple[float, ...]
    normal: Floats
    defended: Floats
    note: str


@dataclass(frozen=True)
class FeatureMaps:
    """Where the same images with labels (N,) lie in the plane (N,2) by their features under two networks."""

    pair: ComparedVictims
    labels: Labels
    normal: Floats
    defended: Floats
    note: str


@dataclass(frozen=True)
class ImageGrids:
    """Images (N,H,W,3) in [0,1] made from two networks, with the labels (N,) for which both were made."""

    pair: ComparedVictims
    labels: Labels
    normal: Floats
    defended: Floats
    note: str


def answers(shown: PredictionBars) -> "Figure":
    """A row an image: the image, and for each temperature the class probabilities of both services as bars."""
    count, columns = len(shown.images), 2 * len(shown.temperatures)
    wide = max(BARS, LETTER * len(shown.pair.defense))
    figure = canvas(PHOTO + wide * columns + MARGIN, ROW * count + 2 * LINE + MARGIN)
    grid = figure.subplots(count, 1 + columns, squeeze=False, width_ratios=[PHOTO] + [wide] * columns)
    _head(figure, shown.pair, "Answers", f"class probabilities  ·  {shown.note}  ·  shaded: the true class")
    for index, (photo, *charts) in enumerate(grid):
        _photo(photo, shown.images[index], int(shown.labels[index]))
        for number, temperature in enumerate(shown.temperatures):
            pair = charts[2 * number], charts[2 * number + 1]
            _bars(pair, shown, number, index)
            if not index:
                _titles(pair, shown.pair, f"\nT = {temperature:g}")
            for ax in pair:
                ax.tick_params(labelbottom=index == count - 1)
                ax.set_xlabel("class" if index == count - 1 else "")
    return figure


def features(shown: FeatureMaps) -> "Figure":
    """Two maps of the same images, coloured by class."""
    classes = np.unique(shown.labels)
    figure = canvas(2 * MAP + MARGIN, MAP + 2 * LINE + MARGIN)
    axes = figure.subplots(1, 2)
    _head(figure, shown.pair, "Penultimate features", f"{shown.note}  ·  colours: classes")
    for ax, places in zip(axes, (shown.normal, shown.defended), strict=True):
        for index, (label, color) in enumerate(zip(classes, _colors(len(classes)), strict=True)):
            mine, marker = places[shown.labels == label], MARKERS[index % len(MARKERS)]
            ax.scatter(mine[:, 0], mine[:, 1], s=15, marker=marker, color=color, linewidths=0, label=str(label))
        ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        ax.spines[:].set(visible=True, color=MUTED)
    _titles((axes[0], axes[1]), shown.pair)
    if len(classes) <= NAMED:
        _legend(figure, axes[0], len(classes))
    return figure


def inverted(shown: ImageGrids) -> "Figure":
    """Two sheets of images, a row a class; where there are too few of each class, the images in their order."""
    rows = _rows(shown.labels)
    columns = max(len(row) for row in rows)
    height, width = shown.normal.shape[1:3]
    figure = canvas(2 * SHEET + MARGIN, (SHEET - LINE) * len(rows) * height / (columns * width) + MARGIN)
    axes = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    _head(figure, shown.pair, "Inverted images", f"{shown.note}  ·  rows: the classes that they were made for")
    for ax, images in zip(axes, (shown.normal, shown.defended), strict=True):
        _sheet(ax, images, rows)
    axes[0].set_yticks(range(len(rows)), [_span(shown.labels[row]) for row in rows])
    axes[0].set_ylabel("class")
    _titles((axes[0], axes[1]), shown.pair)
    return figure


def _legend(figure: "Figure", ax: "Axes", classes: int) -> None:
    columns = min(classes, NAMED // 2)
    style: dict[str, Any] = {"frameon": False, "columnspacing": 1.2, "handletextpad": 0.1, "markerscale": 1.6}
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, **style)


def _bars(axes: "tuple[Axes, Axes]", shown: PredictionBars, number: int, index: int) -> None:
    """The bars of one image at one temperature. All charts of a temperature have one scale: answers can be compared."""
    top = min(1.0, 1.08 * float(max(shown.normal[number].max(), shown.defended[number].max())))
    classes = shown.normal.shape[2]
    for ax, probabilities, color in zip(axes, (shown.normal, shown.defended), (QUIET, ACCENT), strict=True):
        label = float(shown.labels[index])
        half_width = max(0.5, classes / 60)  # among many classes, one would not be seen
        ax.axvspan(label - half_width, label + half_width, color=EMPTY, zorder=0, linewidth=0)
        ax.bar(np.arange(classes), probabilities[number, index], width=0.8 if classes <= NAMED else 1, color=color)
        ax.set(xlim=(-0.6, classes - 0.4), ylim=(0, top))
        ax.set_xticks(_ticks(classes))
        ax.locator_params(axis="y", nbins=3)
        ax.tick_params(axis="x", length=2)
        ax.tick_params(axis="y", length=2, labelleft=ax is axes[0])


def _ticks(classes: int) -> list[int]:
    """Up to ten classes all of them, of more about five."""
    step = 1 if classes <= 10 else next(s for s in itertools.count(5, 5) if classes / s <= 5)
    return list(range(0, classes, step))


def _photo(ax: "Axes", image: Floats, label: int) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_ylabel(f"class {label}")


def _rows(labels: Labels) -> list[NDArray[np.intp]]:
    """Which images stand in each row of a sheet: some of a class, as many of each, if there are at least two."""
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    fewest = min(len(row) for row in classes)
    if fewest > 1:
        return [row[: min(fewest, CHUNK)] for row in classes]
    order = np.argsort(labels, kind="stable")
    return [order[start : start + CHUNK] for start in range(0, len(labels), CHUNK)]


def _span(labels: Labels) -> str:
    first, last = int(labels.min()), int(labels.max())
    return str(first) if first == last else f"{first}–{last}"


def _sheet(ax: "Axes", images: Floats, rows: Sequence[NDArray[np.intp]]) -> None:
    """Each image into a unit square around (column, row)."""
    for row, members in enumerate(rows):
        for column, image in enumerate(images[members]):
            half_width = 0.5 - GAP / 2
            extent = (column - half_width, column + half_width, row + half_width, row - half_width)
            ax.imshow(image, extent=extent, vmin=0, vmax=1, interpolation="nearest")
    height, width = images.shape[1:3]
    ax.set(xlim=(-0.5, max(map(len, rows)) - 0.5), ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    ax.set_aspect(height / width)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _colors(count: int) -> list[tuple[float, float, float]]:
    """A colour a class: those that the colour-blind can tell apart, as long as there are enough of them."""
    import seaborn as sns

    return list(sns.color_palette("colorblind", count) if count <= 10 else sns.color_palette("husl", count))


def _titles(axes: "tuple[Axes, Axes]", pair: ComparedVictims, suffix: str = "") -> None:
    axes[0].set_title(f"undefended{suffix}", color=INK)
    axes[1].set_title(f"{pair.defense}{suffix}", color=INK)


def _head(figure: "Figure", pair: ComparedVictims, title: str, note: str) -> None:
    head(figure, f"{title}: the undefended victim and '{pair.defense}'", pair.about, note)
