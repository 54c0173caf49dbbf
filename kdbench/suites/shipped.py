"""The suite files that ship with kdbench, and what a suite file that does not say is taken to say."""

import tomllib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from kdbench.errors import KdbenchError


def shipped() -> list[str]:
    """Names of the suites that ship with kdbench."""
    folder = _benchmarks() / "suites"
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml"))


def shipped_text(name: str) -> str:
    """The text of the suite file that ships under `name`."""
    return (_benchmarks() / "suites" / f"{name}.toml").read_text(encoding="utf-8")


@cache
def defaults() -> dict[str, Any]:
    """The fields of a suite file whose defaults name methods or data sets, which no module may name."""
    return tomllib.loads((_benchmarks() / "defaults.toml").read_text(encoding="utf-8"))


def _benchmarks() -> Traversable:
    try:
        return files("kdbench.benchmarks")
    except ModuleNotFoundError:  # the checkout's kdbench alone, without the folders that setup.cfg maps into it
        raise KdbenchError(
            "The benchmarks of kdbench cannot be imported. Inside a checkout, run pip install -e ."
        ) from None
