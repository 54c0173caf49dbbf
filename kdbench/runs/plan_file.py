"""plan.json: what a results folder is to hold. Written before the run, so that `kdbench status` can say how far it is."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kdbench.atomic import replacing
from kdbench.errors import KdbenchError

FILE = "plan.json"


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the plan: its key in the store, and its title for people."""

    key: str
    title: Annotated[str, Field(validation_alias=AliasChoices("title", "label"))]  # "label": until schema 2 of records


@dataclass(frozen=True)
class PlanFile:
    """The store that a run uses, relative to the results folder, the run's stages, and the names of its cells."""

    store: str
    stages: tuple[PlannedStage, ...]
    cells: tuple[str, ...]


_ADAPTER = TypeAdapter(PlanFile)


def read(folder: Path) -> PlanFile:
    """The plan of the run that writes to `folder`.

    Raises `KdbenchError` when the folder has none, or a damaged one.
    """
    try:
        return _ADAPTER.validate_json((folder / FILE).read_bytes(), strict=True)
    except FileNotFoundError:
        raise KdbenchError(f"{folder} is not the results folder of a run: it has no {FILE}.") from None
    except ValidationError:
        raise KdbenchError(
            f"{folder / FILE} is damaged; `kdbench run` with `--out {folder}` writes it again, and repeats nothing."
        ) from None


def write(store: str, stages: Iterable[tuple[str, str]], cells: Iterable[str], folder: Path) -> None:
    """Write a plan (stages: key and title), a line an entry; piece by piece, for plans may be long."""
    with replacing(folder / FILE) as file:
        file.write(f'{{"store": {json.dumps(store)},\n "stages": ['.encode())
        for number, (key, title) in enumerate(stages):
            file.write((_separator(number) + json.dumps({"key": key, "title": title})).encode())
        file.write(b'],\n "cells": [')
        for number, name in enumerate(cells):
            file.write((_separator(number) + json.dumps(name)).encode())
        file.write(b"]}\n")


def _separator(number: int) -> str:
    return ",\n  " if number else "\n  "


def store_of(folder: Path) -> Path:
    """Where the store of the run in `folder` lies."""
    return folder / read(folder).store


def relative(store: Path, folder: Path) -> str:
    """The store as a plan names it: both may move together."""
    return os.path.relpath(store, folder)
