"""Where keys stand in a TOML text, so that a mistake can be blamed on its line."""

import re
from collections.abc import Iterator


def parts(dotted: str) -> tuple[str, ...]:
    """The names in a dotted key; a quoted one may hold dots."""
    return tuple("".join(names) for names in re.findall(r"""\"([^"]*)\"|'([^']*)'|([^."'\s]+)""", dotted)) or (dotted,)


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line (from 1) of the key or table at `path` in a TOML text, else of something in it, else of what holds it."""
    for depth in range(len(path), 0, -1):
        found = [(len(key), number) for number, key in keys_of(text) if key[:depth] == path[:depth]]
        if found:
            return min(found)[1]
    return None


def keys_of(text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The lines (from 1) on which a table or a key begins, each with its full path."""
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = parts(header[1])
            yield number, table
        elif key := re.match(r"\s*([\w.\"'+-]+)\s*=", line):
            yield number, (*table, *parts(key[1]))
