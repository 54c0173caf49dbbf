"""Digests of values and of files."""

import hashlib
import json
from pathlib import Path

from kdbench.game.fields import plain

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, cut to 128 bits. Raises `ValueError` for infinite values and NaN."""
    return json_digest(plain(value))


def json_digest(value: object) -> str:
    """The same of a value that is plain JSON already: a long plan has many thousands of them."""
    text = _CANONICAL.encode(value)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
