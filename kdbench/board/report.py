"""The report of a results folder: its README.md, made of the cells and of nothing else."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from kdbench import records as results
from kdbench.board.boards import boards, leaderboards, write_boards
from kdbench.board.document import grid, markdown
from kdbench.board.plots import drawing as plots
from kdbench.board.study import NO_QUERY, facts
from kdbench.records import Cell, MethodRecord, Status, write_text

__all__ = ["leaderboards", "write_all", "write_report"]

NAME = "README.md"
FIGURES = {
    "answers": "Answers",
    "features": "Features",
    "inverted": "Inverted images",
}  # of victims, if they were drawn
UNFOLDED = 4  # figures that are shown without being asked for

Seconds = dict[str, dict[str, float]]
"""Seconds of distinct stages: kind -> stage -> seconds. Cells that share a stage share its cost."""


def write_all(folder: Path) -> None:
    """Make all that a results folder holds besides its cells: leaderboards, plots, report.

    Raises `KdbenchError` for a folder without results.
    """
    write_boards(folder)
    plots.draw(folder)
    write_report(folder)


def write_report(folder: Path) -> Path:
    """Write the report into `folder`; its links need the plots of `plots.draw` and the pictures of the run.

    Figures that `kdbench plot --figure` has drawn are shown as far as they are there.
    """
    cells = results.read(folder)
    parts = [f"# Results: {cells[0].suite}", _GENERATED, *_played(cells)]
    parts += [markdown(board, level=2).rstrip() for board in boards(cells)]
    parts += [*_plots(cells), *_figures(folder), *_pictures(cells), *_costs(cells), _HOW_TO_READ]
    path = folder / NAME
    write_text(path, "\n\n".join(parts) + "\n")
    return path


_GENERATED = "Generated from the files in `cells/` by `kdbench`; do not edit."


def _played(cells: Sequence[Cell]) -> list[str]:
    about = facts(cells)
    rows = [
        ["Data set", f"{about['dataset']}, {about['classes']} classes, digest `{about['dataset_digest']}`"],
        ["Victim", about["victim"]],
        ["Student", ", ".join(about["students"])],
        ["Seeds", f"{', '.join(str(seed) for seed in about['seeds'])} (n = {len(about['seeds'])})"],
        ["Tolerance", f"{100 * about['tolerance']:g} points of victim accuracy"],
        ["Cells", _counts(cells)],
        *_distinct("Protocol", [_flat(cell.protocol) for cell in cells]),
        *_distinct("Machine", [cell.machine for cell in cells]),
    ]
    return ["## What was played", grid(["", ""], rows), _methods(cells), _threats(cells)]


def _counts(cells: Iterable[Cell]) -> str:
    counts = {status: sum(cell.status is status for cell in cells) for status in Status}
    return ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)


def _distinct(title: str, records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each name in the records, with all its values."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, value in record.items():
            found[name].add(_plain(value))
    return [[f"{title}: {name}", ", ".join(sorted(values))] for name, values in sorted(found.items())]


def _flat(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Each table of the protocol in a line."""
    return {name: _pairs(value) if isinstance(value, Mapping) else _plain(value) for name, value in protocol.items()}


def _pairs(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in fields.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _methods(cells: Iterable[Cell]) -> str:
    """Who played, with all hyper-parameters."""
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        roles = [("defense", cell.defense), ("attack" if cell.defense else "baseline", cell.attack)]
        for role, player in roles:
            if player:
                rows[role, player.name] = [role, player.name, _registered(player), _pairs(player.fields)]
    order = ["defense", "attack", "baseline"]
    ordered = sorted(rows, key=lambda key: (order.index(key[0]), key[1]))
    return grid(["Role", "Label", "Method", "Hyper-parameters"], [rows[key] for key in ordered])


def _registered(player: MethodRecord) -> str:
    return f"{player.method} ({player.origin})"


def _threats(cells: Iterable[Cell]) -> str:
    """Under which threat model each attack played."""
    attacks: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        attacks[_pairs(dict(sorted(cell.scenario.items())))].add(cell.attack.name)
    rows = [[scenario, ", ".join(sorted(labels))] for scenario, labels in sorted(attacks.items())]
    return grid(["Threat model", "Attacks"], rows)


def _plots(cells: Sequence[Cell]) -> list[str]:
    drawn = [f"![{plot.caption}]({plots.FOLDER}/{quote(plot.name)}.png)" for plot in plots.plots(cells)]
    return ["## Plots", *drawn] if drawn else []


def _figures(folder: Path) -> list[str]:
    """The figures of victims that somebody has drawn into the folder."""
    shown = [
        f"![{words}: {path.stem.removeprefix(f'{name}-')}]({plots.FOLDER}/{quote(path.name)})"
        for name, words in FIGURES.items()
        for path in sorted((folder / plots.FOLDER).glob(f"{name}-*.png"))
    ]
    if len(shown) <= UNFOLDED:
        return ["## Figures", *shown] if shown else []
    return ["## Figures", _folded(f"{len(shown)} figures", shown)]


def _pictures(cells: Iterable[Cell]) -> list[str]:
    """Each picture once, with the cell that it shows."""
    shown = {path: cell for cell in cells for path in cell.pictures}
    lines = [f"{_title(cell)}:\n\n![{_title(cell)}]({quote(path)})" for path, cell in sorted(shown.items())]
    if not lines:
        return []
    return ["## Pictures", _folded(f"{len(lines)} pictures", lines)]


def _folded(summary: str, parts: Iterable[str]) -> str:
    body = "\n\n".join(parts)
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _title(cell: Cell) -> str:
    against = cell.defense.name if cell.defense else NO_QUERY
    return f"{cell.attack.name} against {against}, student {cell.student}, seed {cell.seed}"


def _costs(cells: Sequence[Cell]) -> list[str]:
    """Seconds by kind of stage, and what each attack and defense takes."""
    stages = _seconds(cells)
    rows = [
        [kind, str(len(of_kind)), f"{sum(of_kind.values()):,.1f}", f"{fmean(of_kind.values()):,.2f}"]
        for kind, of_kind in stages.items()
    ]
    by_attack = _by(cells, "steal", lambda cell: cell.attack.name)
    queries = _queries(cells)
    attacks = [[label, cost, queries.get(label, "–")] for label, cost in by_attack.items()]
    hardened, auxiliary_seconds = (
        _by(cells, kind, lambda cell: cell.defense.name if cell.defense else "") for kind in ("harden", "auxiliary")
    )
    parts = ["## Cost"]
    parts += [grid(["Stage", "n", "Seconds in all", "Mean seconds"], rows, right={1, 2, 3})] if rows else []
    parts += [grid(["Attack", "Mean seconds to steal", "Mean queries"], attacks, right={1, 2})] if attacks else []
    trained = sorted(hardened.keys() | auxiliary_seconds.keys())
    defenses = [[label, hardened.get(label, "–"), auxiliary_seconds.get(label, "–")] for label in trained]
    head = ["Defense", "Mean seconds to harden", "Mean seconds to equip its service"]
    parts += [grid(head, defenses, right={1, 2})] if defenses else []
    return parts if len(parts) > 1 else []


def _seconds(cells: Iterable[Cell]) -> Seconds:
    stages: Seconds = defaultdict(dict)
    for cell in cells:
        for role, seconds in cell.seconds.items():
            key = cell.keys.get(role, f"{role}/{cell.name}")
            stages[key.split("/")[0]][key] = seconds
    return dict(sorted(stages.items()))


def _by(cells: Iterable[Cell], kind: str, name: Callable[[Cell], str]) -> dict[str, str]:
    """The mean seconds of the distinct stages of one kind, by what `name` says of the cell; empty names are left out."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if name(cell):
            groups[name(cell)].append(cell)
    found = {label: _seconds(own).get(kind, {}) for label, own in sorted(groups.items())}
    return {label: f"{fmean(stages.values()):,.2f}" for label, stages in found.items() if stages}


def _queries(cells: Iterable[Cell]) -> dict[str, str]:
    counts: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        if "queries" in cell.metrics:
            counts[cell.attack.name].append(cell.metrics["queries"])
    return {label: f"{fmean(numbers):,.0f}" for label, numbers in counts.items()}


_HOW_TO_READ = """## How to read this

- n is the number of seeds: each has its own victim, its own defenses trained on it, and its own students. Intervals say
  how far the mean over seeds may be off; they say nothing about other data sets, networks, budgets or attacks.
- Nobody is ahead of another whose interval overlaps. With fewer than three seeds no order can be trusted.
- A defense is as good as the best attack that was tried on it. A better attack may exist: an unexamined defense has not
  even met one that was made for it.
- Accuracies are counts over all test images. All choices (best response, best baseline) are made on validation data.
- Seconds depend on the machine and on what else it did. A stage that several cells share is counted once.
- `leaderboard.json` and `robustness.json` describe their columns; the CSV files have the same names."""
