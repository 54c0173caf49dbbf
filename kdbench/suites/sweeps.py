"""Sweeps: a method that a suite file runs with several values of a field becomes as many methods, each with a name."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdbench.errors import KdbenchError
from kdbench.game.fields import Checked
from kdbench.suites.toml_lines import parts

Tree = dict[str, Any]
SWEPT = "+"  # in the name of a point, after that of the method
LISTS = {"defense": ("defenses",), "attack": ("attacks", "baselines")}


@dataclass(frozen=True)
class Sweep(Checked):
    """`[[sweep]]`: the field at the dotted path `vary` takes each of `values` in turn.

    `vary` may name several fields of one method, which change together; each of `values` is then a list of as many. The
    names of the points show the first. Two sweeps of one method make all combinations.
    """

    vary: str | tuple[str, ...]
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        owners = {tuple(path[:2]) for path in self.paths}
        if len(owners) != 1 or any(len(path) < 3 or path[0] not in LISTS for path in self.paths):
            raise KdbenchError(
                "sweep.vary names fields of one defense or attack, such as defense.nasty.omega, "
                f"not {', '.join(map(repr, [self.vary] if isinstance(self.vary, str) else self.vary)) or 'nothing'}."
            )
        if not self.values:
            raise KdbenchError("sweep.values must hold at least one value, not [].")
        uneven = [value for value in self.values if len(self._row(value)) != len(self.paths)]
        if uneven:
            raise KdbenchError(f"sweep.values must hold {len(self.paths)} values for each point, not {uneven[0]}.")

    @property
    def paths(self) -> list[list[str]]:
        """The names on the way to each field that varies."""
        return [list(parts(path)) for path in ([self.vary] if isinstance(self.vary, str) else self.vary)]

    @property
    def method(self) -> tuple[str, str]:
        """Kind and name of the method that is swept."""
        kind, name = self.paths[0][:2]
        return kind, name

    def points(self) -> Iterator[tuple[str, list[tuple[list[str], Any]]]]:
        """For each point the end of its name, and the fields (path below the method's table) with their values."""
        for value in self.values:
            row = self._row(value)
            ending = f"{SWEPT}{self.paths[0][-1]}-{_word(row[0])}"
            yield ending, list(zip((p[2:] for p in self.paths), row, strict=True))

    def _row(self, value: Any) -> list[Any]:
        return [value] if isinstance(self.vary, str) else list(value) if isinstance(value, list | tuple) else []


def listed(tree: Tree, kind: str) -> list[str]:
    """The names of the methods of a kind that the lists of `tree` run."""
    return [name for key in LISTS[kind] for name in tree.get(key, ())]


def spread(tree: Tree, sweeps: Sequence[Sweep]) -> dict[str, str]:
    """Write into `tree` a table for each point of each sweep, and list the points instead of the swept method.

    Returns the name of the swept method by the name of each point. Tables are made for a method that is not run, too,
    so that mistakes in them are found. Raises `KdbenchError` for two points of one name, a field that is swept twice,
    and a point that has a table already.
    """
    origins: dict[str, str] = {}
    _once([path for sweep in sweeps for path in sweep.paths])
    for sweep in sweeps:
        kind, name = sweep.method
        tables = tree.setdefault(kind, {})
        known = dict.fromkeys((*listed(tree, kind), *origins))
        for old in [old for old in known if name in (old, origins.get(old))] or [name]:
            points = {f"{old}{ending}": fields for ending, fields in sweep.points()}
            if len(points) < len(sweep.values):
                raise KdbenchError(f"the sweep of {'.'.join(sweep.paths[0])} has two points of one name.")
            for new, fields in points.items():
                if new in tables:
                    raise KdbenchError(f"{kind}.{new} is a point of a sweep: it has no table of its own.")
                tables[new] = _table(tables.get(old, {}), name, fields)
                origins[new] = name
            _replace(tree, kind, old, list(points))
    return origins


def _once(paths: list[list[str]]) -> None:
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise KdbenchError(f"{'.'.join(twice[0])} is swept twice.")


def _replace(tree: Tree, kind: str, old: str, new: list[str]) -> None:
    for key in LISTS[kind]:
        if key in tree:
            tree[key] = [name for known in tree[key] for name in (new if known == old else [known])]


def _table(base: Tree, method: str, fields: list[tuple[list[str], Any]]) -> Tree:
    table = {"method": method, **copy.deepcopy(base)}
    for path, value in fields:
        *tables, key = path
        inner = table
        for name in tables:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise KdbenchError(f"{method}: '{'.'.join(path)}' cannot be swept: '{name}' is a value, not a table.")
        inner[key] = value
    return table


def _word(value: Any) -> str:
    """A value as part of a name: of a list, its length."""
    if isinstance(value, list | tuple):
        return str(len(value))
    return f"{value:g}" if isinstance(value, int | float) else re.sub(r"[^\w.-]+", "-", str(value))
