"""Older spellings of a suite file, read as what they are called now.

`[threat]` is `[scenario]`, its `answers` are `access`, and `[[published]]` is `[[reported]]`. Fields of a method that
were renamed are said by the method itself, in `renamed`.
"""

from typing import Any

from kdbench.errors import KdbenchError

TABLES = {"threat": "scenario", "published": "reported"}
FIELDS = {("scenario", "answers"): "access"}

Tree = dict[str, Any]


def modern(tree: Tree) -> Tree:
    """The same suite file with today's names. Raises `KdbenchError` where both names of one thing are written."""
    return {key: _table(key, value) for key, value in _renamed(tree, TABLES, "").items()}


def modern_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """The same place of a suite file under today's names."""
    if not path:
        return path
    top, *rest = TABLES.get(path[0], path[0]), *path[1:]
    return (top, *(FIELDS.get((top, name), name) if depth == 0 else name for depth, name in enumerate(rest)))


def _table(key: str, value: Any) -> Any:
    fields = {old: new for (table, old), new in FIELDS.items() if table == key}
    return _renamed(value, fields, f"{key}.") if isinstance(value, dict) and fields else value


def _renamed(tree: Tree, names: dict[str, str], where: str) -> Tree:
    for old, new in names.items():
        if old in tree and new in tree:
            raise KdbenchError(f"'{where}{old}' is the old name of '{where}{new}': write one of them.")
    return {names.get(key, key): value for key, value in tree.items()}
