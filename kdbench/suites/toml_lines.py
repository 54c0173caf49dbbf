"""Where keys stand in a TOML text, so that a mistake is reported with its line."""

import re
from collections.abc import Iterable, Iterator

Path = tuple[str, ...]


def parts(dotted: str) -> Path:
    """The names in a dotted key; a quoted one may hold dots."""
    return tuple("".join(names) for names in re.findall(r"""\"([^"]*)\"|'([^']*)'|([^."'\s]+)""", dotted)) or (dotted,)


def keys_of(text: str) -> Iterator[tuple[int, Path]]:
    """The lines (from 1) on which a table or a key begins, each with its full path."""
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = parts(header[1])
            yield number, table
        elif key := re.match(r"\s*([\w.\"'+-]+)\s*=", line):
            yield number, (*table, *parts(key[1]))


def line_of(keys: Iterable[tuple[int, Path]], path: Path) -> int | None:
    """The line of the key or table at `path`, else of something in it, else of the table that holds it."""
    known = list(keys)
    for depth in range(len(path), 0, -1):
        found = [(len(key), number) for number, key in known if key[:depth] == path[:depth]]
        if found:
            return min(found)[1]
    return None
