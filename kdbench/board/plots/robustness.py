"""Adversarial accuracy of victims and students, by defense."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdbench.board.intervals import Estimate
from kdbench.board.plots.style import EMPTY, about, bars_note, figure_for, head, order, rows_on_axes
from kdbench.board.study import Study
from kdbench.board.tables.robustness import STUDENT, VICTIM, robust_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def has_robustness(study: Study) -> bool:
    """Whether any victim was evaluated for adversarial robustness."""
    return bool(robust_metrics(study.cells, VICTIM))


def adversarial_accuracy(study: Study) -> "Figure":
    """Adversarial accuracy of victims, and of the students of the strongest attack, by defense."""
    defenses = order(study)
    titles = robust_metrics(study.cells, VICTIM)
    figure = figure_for(8.2, 0.22 * (len(titles) + 1) * len(defenses), defenses, tilted=False)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    head(figure, "Adversarial accuracy", about(study), f"{bars_note(study)}white box")
    _dots(left, defenses, {t: [_of_victim(study, d, name) for d in defenses] for name, t in titles.items()})
    _dots(right, defenses, {t: [_of_student(study, d, name) for d in defenses] for name, t in titles.items()})
    left.set_title("victims as hardened")
    right.set_title("students of the strongest attack")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(titles), frameon=False)
    return figure


def _dots(ax: "Axes", rows: Sequence[str], series: Mapping[str, Sequence[Estimate | None]]) -> None:
    """A dot with its interval for each series in each row."""
    import seaborn as sns

    colors = sns.color_palette("colorblind", len(series))
    for index, (name, values) in enumerate(series.items()):
        shift = (index + 1) / (len(series) + 1)
        known = [(row + shift, value) for row, value in enumerate(values) if value]
        if known:
            ax.errorbar(
                [100 * value.mean for _, value in known],
                [y for y, _ in known],
                xerr=[100 * (value.half_width or 0) for _, value in known],
                fmt="osD^v"[index % 5],
                color=colors[index],
                label=name,
                capsize=2,
                markersize=6,
            )
    for row in range(1, len(rows)):
        ax.axhline(row, color=EMPTY, linewidth=1, zorder=0)
    rows_on_axes(ax, list(rows))
    ax.set_xlabel("accuracy under attack (%)")


def _of_victim(study: Study, defense: str, metric: str) -> Estimate | None:
    return study.victims[defense].mean(metric)


def _of_student(study: Study, defense: str, metric_of_victim: str) -> Estimate | None:
    pairing = study.strongest_attack(defense)
    return pairing.mean(metric_of_victim.replace(VICTIM, STUDENT, 1)) if pairing else None
