"""What the tests of suite files share: a file that is right, reading it, and what is said of a wrong one."""

from pathlib import Path
from typing import Any

import pytest

from kdbench.api import KdbenchError
from kdbench.suites.reader import load
from kdbench.suites.suite import Suite

Json = dict[str, Any]
HEAD = """\
defenses = ["none", "nasty"]
attacks = ["kd"]
dataset = "blobs"
"""
NETWORKS = """
[victim]
network = "mini-16"

[student]
networks = ["mini-8", "mini-16"]
"""
GOOD = HEAD + NETWORKS
OMEGA = '\n[[sweep]]\nvary = "defense.nasty.omega"\nvalues = [0.1, 1]\n'
POINTS = ["nasty+omega-0.1", "nasty+omega-1"]


def write(folder: Path, text: str) -> str:
    """The path of a new suite file in `folder`."""
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(folder: Path, text: str, changes: Json | None = None) -> Suite:
    """The suite of a file with that text."""
    return load(write(folder, text), changes)


def complaint(folder: Path, text: str, changes: Json | None = None) -> str:
    """What is said of a wrong file, without the folder."""
    with pytest.raises(KdbenchError) as caught:
        read(folder, text, changes)
    return str(caught.value).replace(f"{folder}/", "")


def sweep(vary: str, values: str) -> str:
    """The table of a sweep as a file has it; its first line is blank."""
    return f"\n[[sweep]]\nvary = {vary}\nvalues = {values}\n"


def names(folder: Path, text: str, changes: Json | None = None) -> list[str]:
    """The names of the defenses that a file runs."""
    return [choice.name for choice in read(folder, text, changes).defenses]
