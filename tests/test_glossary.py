"""The glossary explains every metric, column, warning and option, each term in one line."""

import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdbench import cli
from kdbench.board import tables
from kdbench.board.document import Column
from kdbench.board.warnings import MEANING
from kdbench.metrics import METRICS, Metric

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
UNIT = re.compile(r" \([^)]*\)$")


def entries() -> dict[str, str]:
    """Term in lower case -> the line that explains it."""
    found: dict[str, str] = {}
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        head, colon, text = line.partition(": ")
        if line.startswith("- **") and colon:
            found |= {term.strip("`").lower(): line for term in re.findall(r"\*\*(.+?)\*\*", head)}
            assert text
    return found


def columns() -> set[str]:
    """The headings, without units, of all columns that the tables of the board declare."""
    names = [info.name for info in pkgutil.walk_packages(tables.__path__, f"{tables.__name__}.")]
    found = [column for name in names for value in vars(import_module(name)).values() for column in inside(value)]
    return {UNIT.sub("", column.heading) for column in found}


def inside(value: object) -> list[Column[Any]]:
    """The columns in a value of a module: one, or a sequence of them."""
    if isinstance(value, list | tuple):
        return [column for each in value for column in inside(each)]
    return [value] if isinstance(value, Column) else []


def options() -> set[str]:
    """The options of all commands that help shows."""
    commands = [[], *([name] for name in cli.main.commands)]
    texts = [CliRunner().invoke(cli.main, [*command, "--help"]).output for command in commands]
    return {option for text in texts for option in re.findall(r"^ +(?:-\w, )?(--[\w-]+)", text, re.MULTILINE)}


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_every_metric_is_explained(metric: Metric) -> None:
    assert f"`{metric.name}`" in entries()[metric.heading.lower()]


def test_no_metric_is_explained_that_is_not_measured() -> None:
    text = GLOSSARY.read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:victim|student)_\w+)`", text)) <= set(METRICS)


def test_every_column_of_the_leaderboards_is_explained() -> None:
    found = columns()
    assert len(found) > 15
    assert not [heading for heading in found if heading.lower() not in entries()]


def test_every_warning_is_explained() -> None:
    assert len(MEANING) > 3
    assert not [warning for warning in MEANING if warning.lower() not in entries()]


def test_every_option_of_the_command_line_is_explained_and_no_other() -> None:
    found = options()
    assert len(found) > 20
    explained = {term for term in entries() if term.startswith("--")}
    assert found == explained


def test_every_term_has_one_line_and_none_is_explained_twice() -> None:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    assert all(re.match(r"- \*\*.+?\*\*.*: .+\.$", line) for line in lines), "a term, a colon, a sentence"
    by_section = re.split(r"^## ", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in by_section:
        terms = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
        assert len(terms) == len(set(terms))
