"""What a run cost: seconds by kind of stage, and what each attack and defense takes."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from kdbench.board.formats.markdown import grid
from kdbench.records import Cell

Seconds = Mapping[str, Mapping[str, float]]
"""Seconds of distinct stages: kind -> stage -> seconds. Cells that share a stage share its cost."""


def costs(cells: Sequence[Cell]) -> list[str]:
    """A section of the report; nothing where no seconds were recorded."""
    tables = [table for table in (_by_kind(cells), _by_attack(cells), _by_defense(cells)) if table]
    return ["## Cost", *tables] if tables else []


def _by_kind(cells: Iterable[Cell]) -> str:
    rows = [
        [kind, str(len(stages)), f"{sum(stages.values()):,.1f}", f"{fmean(stages.values()):,.2f}"]
        for kind, stages in _seconds(cells).items()
    ]
    return grid(["Stage", "n", "Seconds in all", "Mean seconds"], rows, right={1, 2, 3}) if rows else ""


def _by_attack(cells: Iterable[Cell]) -> str:
    queries = _queries(cells)
    means = _means(cells, "steal", lambda cell: cell.attack.name)
    rows = [[name, mean, queries.get(name, "–")] for name, mean in means.items()]
    return grid(["Attack", "Mean seconds to steal", "Mean queries"], rows, right={1, 2}) if rows else ""


def _by_defense(cells: Sequence[Cell]) -> str:
    kinds = ("harden", "auxiliary")
    harden, auxiliary = (_means(cells, kind, lambda c: c.defense.name if c.defense else "") for kind in kinds)
    names = sorted(harden.keys() | auxiliary.keys())
    rows = [[name, harden.get(name, "–"), auxiliary.get(name, "–")] for name in names]
    head = ["Defense", "Mean seconds to harden", "Mean seconds of its auxiliary model"]
    return grid(head, rows, right={1, 2}) if rows else ""


def _seconds(cells: Iterable[Cell]) -> Seconds:
    stages: dict[str, dict[str, float]] = defaultdict(dict)
    for cell in cells:
        for role, seconds in cell.seconds.items():
            key = cell.keys.get(role, f"{role}/{cell.name}")
            stages[key.split("/")[0]][key] = seconds
    return dict(sorted(stages.items()))


def _means(cells: Iterable[Cell], kind: str, name: Callable[[Cell], str]) -> dict[str, str]:
    """The mean seconds of the distinct stages of one kind, by what `name` says of the cell; empty names are left out."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if name(cell):
            groups[name(cell)].append(cell)
    found = {group: _seconds(own).get(kind, {}) for group, own in sorted(groups.items())}
    return {group: f"{fmean(stages.values()):,.2f}" for group, stages in found.items() if stages}


def _queries(cells: Iterable[Cell]) -> dict[str, str]:
    """The mean number of queries by attack."""
    counts: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        if "queries" in cell.metrics:
            counts[cell.attack.name].append(cell.metrics["queries"])
    return {name: f"{fmean(numbers):,.0f}" for name, numbers in counts.items()}
