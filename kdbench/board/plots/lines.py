"""Lines over an axis, for curves: estimates with their intervals, one legend for all panels of a figure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdbench.board.intervals import Estimate
from kdbench.board.plots.style import EMPTY, HEAD, INK, LINE, figure_for
from kdbench.board.study import UNDEFENDED, Study

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>hp"
Style = tuple[Any, str]  # the colour and the marker of a name, in all panels of a figure


@dataclass(frozen=True)
class Line:
    """Estimates along an axis; dashed: what does not depend on it."""

    name: str
    values: Sequence[Estimate | None]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes with lines in them; `percent`: whether values are fractions."""

    title: str
    lines: Sequence[Line]
    percent: bool = True

    @property
    def known(self) -> bool:
        """Whether there is anything to draw."""
        return any(value for line in self.lines if not line.dashed for value in line.values)


def chart(width: float, height: float, lines: Iterable[Line]) -> "Figure":
    """An empty figure for axes of that size in inches, high and wide enough for a legend of all lines."""
    names = list(dict.fromkeys(line.name for line in lines))
    return figure_for(width, max(height, 1.1 * LINE * len(names) - HEAD), names, tilted=False)


def bands_note(study: Study) -> str:
    """What bars and bands are; with one seed there are none."""
    return "bars and bands: 95 % intervals" if len(study.seeds) > 1 else ""


def constant(name: str, value: Estimate | None, count: int) -> list[Line]:
    """A dashed line with one value at all places; none where the value is unknown."""
    return [Line(name, [value] * count, dashed=True)] if value else []


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """The first ten colours are such that also the colour-blind can tell them apart."""
    import seaborn as sns

    once = list(dict.fromkeys(names))
    some = [*sns.color_palette("colorblind"), *sns.color_palette("dark")]
    colors = some if len(once) <= len(some) else sns.color_palette("husl", len(once))
    return {name: (colors[index], MARKERS[index % len(MARKERS)]) for index, name in enumerate(once)}


def draw_panel(ax: "Axes", panel: Panel, styles: Mapping[str, Style]) -> None:
    """The lines over places 0, 1, …: those with bars a little beside each other, dashed ones with a band."""
    solid = [line for line in panel.lines if not line.dashed]
    scale = 100 if panel.percent else 1
    for line in panel.lines:
        shift = 0.0 if line.dashed else 0.12 * ((solid.index(line) + 0.5) / len(solid) - 0.5)
        known = [(place + shift, value) for place, value in enumerate(line.values) if value]
        xs, values = [x for x, _ in known], [value for _, value in known]
        if known and line.dashed:
            _with_band(ax, line.name, xs, values, scale)
        elif known:
            _with_bars(ax, line.name, xs, values, scale, styles[line.name])
    ax.set_title(panel.title, pad=9)
    ax.grid(color=EMPTY)
    ax.set_axisbelow(True)


def legend(figure: "Figure", lines: Iterable[Line]) -> None:
    """One for all panels: each name once, those of dashed lines last."""
    drawn: dict[str, Artist] = {}
    for ax in figure.axes:
        drawn |= {name: handle for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = sorted(dict.fromkeys((line.dashed, line.name) for line in lines), key=lambda named: named[0])
    names = [name for _, name in ordered if name in drawn]
    figure.legend([drawn[name] for name in names], names, loc="outside right upper", frameon=False)


def _with_band(ax: "Axes", name: str, xs: Sequence[float], values: Sequence[Estimate], scale: float) -> None:
    means = [scale * value.mean for value in values]
    ax.plot(xs, means, "--" if name == UNDEFENDED else "-.", color=INK, linewidth=1.2, label=name)
    low, high = [scale * value.low for value in values], [scale * value.high for value in values]
    ax.fill_between(xs, low, high, color=INK, alpha=0.08, linewidth=0, zorder=0)


def _with_bars(
    ax: "Axes", name: str, xs: Sequence[float], values: Sequence[Estimate], scale: float, style: Style
) -> None:
    color, marker = style
    means, half_widths = [scale * value.mean for value in values], [scale * (value.half_width or 0) for value in values]
    form: dict[str, Any] = {"capsize": 2, "elinewidth": 0.8, "linewidth": 1.6, "markersize": 5}
    ax.errorbar(xs, means, half_widths, fmt=f"-{marker}", color=color, label=name, **form)
