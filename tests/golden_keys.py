"""The keys of a tiny suite. `python tests/golden_keys.py` writes them to golden_keys.json."""

import json
import tempfile
from pathlib import Path

from kdbench.atomic import write_text
from kdbench.engine.numerics import Numerics
from kdbench.engine.planner import make_plan
from kdbench.suites import reader
from kdbench.suites.methods import with_undefended
from runs import TINY

PATH = Path(__file__).with_suffix(".json")
COMMAND = "python tests/golden_keys.py"


def keys() -> dict[str, str]:
    """The key of each stage of the tiny suite, by the stage's title."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.toml"
        path.write_text(TINY)
        suite = with_undefended(reader.load(str(path)))
    return {stage.title: stage.key for stage in make_plan(suite, Numerics(), "d").stages.values()}


def read() -> dict[str, str]:
    """Those that are committed."""
    found: dict[str, str] = json.loads(PATH.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    write_text(PATH, json.dumps(keys(), indent=1, sort_keys=True) + "\n")
