"""The report of a results folder: its README.md, made of the cells and of nothing else."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdbench.atomic import write_text
from kdbench.board.boards import boards, leaderboards, write_boards
from kdbench.board.costs import costs
from kdbench.board.document import Board
from kdbench.board.formats.markdown import folding, grid, markdown
from kdbench.board.plots import drawing
from kdbench.board.studies import Studies
from kdbench.board.study import NO_QUERY
from kdbench.records import FILE, Cell, MethodRecord, Protocol, Status

NAME = "README.md"
FIGURES = {
    "answers": "Answers",
    "features": "Features",
    "inverted": "Inverted images",
}  # of networks, if they were drawn
UNFOLDED = 4  # figures that are shown without being asked for


def write_all(folder: Path, format: str = "table") -> str:
    """Make all that a results folder holds besides its cells: leaderboards, plots, report. The leaderboards as text.

    Raises `KdbenchError` for a folder without results, and for a format that does not exist.
    """
    studies = Studies.read(folder)
    found = boards(studies)
    text = leaderboards(found, format)
    write_boards(found, folder)
    drawing.draw(studies, folder)
    _write(studies, found, folder)
    return text


def write_report(folder: Path) -> Path:
    """Write the report into `folder`; its links need the plots of `drawing.draw` and the pictures of the run.

    Figures that `kdbench plot --figure` has drawn are shown as far as they are there.
    """
    studies = Studies.read(folder)
    return _write(studies, boards(studies), folder)


def _write(studies: Studies, found: Sequence[Board], folder: Path) -> Path:
    parts = [f"# Results: {studies.facts.suite}", _GENERATED, *_what_was_run(studies)]
    parts += [markdown(board, level=2).rstrip() for board in found]
    parts += [*_plots(studies), *_figures(folder), *_pictures(studies.cells), *costs(studies.cells), _HOW_TO_READ]
    path = folder / NAME
    write_text(path, "\n\n".join(parts) + "\n")
    return path


_GENERATED = f"Generated from `{FILE}` by `kdbench`; do not edit."


def _what_was_run(studies: Studies) -> list[str]:
    facts, cells = studies.facts, studies.cells
    rows = [
        ["Data set", f"{facts.dataset}, {facts.classes} classes, digest `{facts.dataset_digest}`"],
        ["Victim", facts.victim],
        ["Student", ", ".join(facts.students)],
        ["Seeds", f"{', '.join(str(seed) for seed in facts.seeds)} (n = {len(facts.seeds)})"],
        ["Tolerance", f"{100 * facts.tolerance:g} points of utility loss"],
        ["Cells", _counts(cells)],
        *_distinct("Protocol", [_tables(cell.protocol) for cell in cells]),
        *_distinct("Machine", [cell.machine for cell in cells]),
    ]
    return ["## What was run", grid(["", ""], rows), _methods(cells), _scenarios(cells)]


def _counts(cells: Iterable[Cell]) -> str:
    counts = {status: sum(cell.status is status for cell in cells) for status in Status}
    return ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)


def _distinct(title: str, records: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """A row for each name in the records, with all its values."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, value in record.items():
            found[name].add(value)
    return [[f"{title}: {name}", ", ".join(sorted(values))] for name, values in sorted(found.items())]


def _tables(protocol: Protocol) -> dict[str, str]:
    """Each table of the protocol in a line."""
    return {
        "victim recipe": _pairs(protocol.victim_recipe),
        "student recipe": _pairs(protocol.student_recipe),
        "robustness": _pairs(protocol.robustness),
        "numerics": _pairs(asdict(protocol.numerics)),
    }


def _pairs(fields: Mapping[str, Any]) -> str:  # fields of methods and recipes may be anything that JSON holds
    return ", ".join(f"{name} {_plain(value)}" for name, value in fields.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _methods(cells: Iterable[Cell]) -> str:
    """Who took part, with all hyper-parameters."""
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        roles = [("defense", cell.defense), ("attack" if cell.defense else "baseline", cell.attack)]
        for role, method in roles:
            if method:
                rows[role, method.name] = [role, method.name, _registered(method), _pairs(method.fields)]
    order = ["defense", "attack", "baseline"]
    ordered = sorted(rows, key=lambda key: (order.index(key[0]), key[1]))
    return grid(["Role", "Name", "Method", "Hyper-parameters"], [rows[key] for key in ordered])


def _registered(method: MethodRecord) -> str:
    return f"{method.method} ({method.origin})"


def _scenarios(cells: Iterable[Cell]) -> str:
    """Under which scenario each attack was run."""
    attacks: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        fields = asdict(cell.scenario)
        name = fields.pop("name")
        attacks[name, _pairs(dict(sorted(fields.items())))].add(cell.attack.name)
    rows = [[name, terms, ", ".join(sorted(names))] for (name, terms), names in sorted(attacks.items())]
    return grid(["Scenario", "What the attacker has", "Attacks"], rows)


def _plots(studies: Studies) -> list[str]:
    shown = [f"![{plot.caption}]({drawing.FOLDER}/{quote(plot.name)}.png)" for plot in drawing.plots(studies)]
    return ["## Plots", *shown] if shown else []


def _figures(folder: Path) -> list[str]:
    """The figures of networks that somebody has drawn into the folder."""
    shown = [
        f"![{words}: {path.stem.removeprefix(f'{name}-')}]({drawing.FOLDER}/{quote(path.name)})"
        for name, words in FIGURES.items()
        for path in sorted((folder / drawing.FOLDER).glob(f"{name}-*.png"))
    ]
    if len(shown) <= UNFOLDED:
        return ["## Figures", *shown] if shown else []
    return ["## Figures", folding(f"{len(shown)} figures", "\n\n".join(shown))]


def _pictures(cells: Iterable[Cell]) -> list[str]:
    """Each picture once, with the cell that it shows."""
    shown = {path: cell for cell in cells for path in cell.pictures}
    lines = [f"{_title(cell)}:\n\n![{_title(cell)}]({quote(path)})" for path, cell in sorted(shown.items())]
    if not lines:
        return []
    return ["## Pictures", folding(f"{len(lines)} pictures", "\n\n".join(lines))]


def _title(cell: Cell) -> str:
    against = cell.defense.name if cell.defense else NO_QUERY
    return f"{cell.attack.name} against {against}, student {cell.student}, seed {cell.seed}"


_HOW_TO_READ = """## How to read this

- n is the number of seeds: each has its own victim, its own defenses trained on it, and its own students. Intervals say
  how far the mean over seeds may be off; they say nothing about other data sets, networks, budgets or attacks.
- No defense is ahead of another whose interval overlaps. With fewer than three seeds no order can be trusted.
- A defense is as good as the strongest attack that was tried on it. A stronger attack may exist: a defense with the warning
  'no adaptive attack run' has not even met one that is made to undo defenses.
- Accuracies are counts over all test images. All choices (strongest attack, best baseline) are made on validation data.
- Seconds depend on the machine and on what else it did. A stage that several cells share is counted once.
- `leaderboard.json` and `robustness.json` describe their columns; the CSV files have the same names."""
