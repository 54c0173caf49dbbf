"""JSON files that are replaced in one step."""

import json
from pathlib import Path

from kdbench.atomic import write_text
from kdbench.engine.manifest import Json
from kdbench.game.fields import plain


def read_json(path: Path) -> Json:
    """The JSON object in a file."""
    value: Json = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: object) -> None:
    """Replace the file at `path`, in one step, with the JSON of a mapping or a dataclass."""
    write_text(path, json.dumps(plain(value), indent=1, sort_keys=True) + "\n")
