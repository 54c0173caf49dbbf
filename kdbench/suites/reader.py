"""Reads suites: a TOML file, with what the command line changes in it, becomes a typed `Suite`."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.errors import KdbenchError, unknown
from kdbench.suites import networks
from kdbench.suites.methods import Methods
from kdbench.suites.old_spellings import modern, modern_path
from kdbench.suites.places import Places
from kdbench.suites.reported import still_about
from kdbench.suites.shipped import defaults, shipped, shipped_text
from kdbench.suites.suite import Suite
from kdbench.suites.suite_file import Fields, SuiteFile, typed
from kdbench.suites.sweeps import LISTS, Sweep, listed, spread
from kdbench.suites.toml_lines import parts

OTHER = {"network": "networks", "networks": "network"}  # two spellings of one field; what was changed counts


def load(name: str, changes: Mapping[str, Any] | None = None) -> Suite:
    """The shipped suite `name`, or the one in the file `name`, with `changes` (dotted path -> value) applied.

    Raises `KdbenchError` with file and line for anything unknown or ill-typed.
    """
    file, text = _text(name)
    try:
        tree = modern(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise KdbenchError(f"{file} is not TOML: {error}.") from None
    for path, value in (changes or {}).items():
        _put(tree, path, value)
    places = Places(file, text, frozenset(modern_path(parts(path)) for path in changes or {}))
    suite_file, unused = _swept(tree, places)
    suite = _suite(suite_file, places)
    for sweep in unused:
        _check_chosen(sweep, places)
    return suite


def _text(name: str) -> tuple[str, str]:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise KdbenchError(f"There is no suite file {name}.")
        try:
            return name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise KdbenchError(f"{name} is not TOML: its text is not UTF-8.") from None
    if name not in shipped():
        raise KdbenchError(f"{unknown('suite', name, shipped())} A path to a .toml file works too.")
    return f"{name}.toml", shipped_text(name)


def _put(tree: Fields, path: str, value: object) -> None:
    """Set the value at a dotted path, making tables on the way."""
    *tables, key = modern_path(parts(path))
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise KdbenchError(f"'{path}' cannot be set: '{table}' is a value, not a table.")
    if tables in (["victim"], ["student"]):
        tree.pop(OTHER.get(key, key), None)
    tree[key] = value


def _swept(tree: Fields, places: Places) -> tuple[SuiteFile, list[Sweep]]:
    """The typed file, with the points of sweeps in place of the methods that are swept; and sweeps of what is not run."""
    tree = {**defaults(), **tree}
    file = typed(tree, places)
    for sweep in file.sweep:
        for path in sweep.paths:
            if tuple(path) in places.changed:
                raise KdbenchError(f"{'.'.join(path)} is swept: change the sweep, or stop it by --set 'sweep=[]'.")
    unused = [sweep for sweep in file.sweep if sweep.method[1] not in listed(tree, sweep.method[0])]
    with places.located("sweep"):
        places.swept = spread(tree, file.sweep)
    places.sweeps = file.sweep
    return typed(tree, places), unused


def _check_chosen(sweep: Sweep, places: Places) -> None:
    """A sweep of a method that is not run does nothing: fine when the command line chose among the file's methods."""
    kind, name = sweep.method
    chosen = any((key,) in places.changed for key in LISTS[kind]) and ("sweep",) not in places.changed
    if name not in places.swept and not chosen:  # a point of another sweep is run if that one is
        keys = " or ".join(LISTS[kind])
        raise places.error(sweep.paths[0], f"the {kind} '{name}' is swept but not run: name it among the {keys}.")


def _suite(file: SuiteFile, places: Places) -> Suite:
    methods = Methods(file, places)
    reported, left_out = still_about(file.reported, places.changed)
    suite = Suite(
        name=Path(places.file).stem,
        title=file.title,
        dataset=methods.dataset(),
        seeds=_seeds(file, places),
        tolerance=file.tolerance,
        precision=file.precision,
        scenario=file.scenario,
        robustness=file.robustness,
        victim=networks.victim(file, places),
        victim_recipe=file.victim.recipe,
        students=networks.students(file, places),
        student_recipes=networks.student_recipes(file, places),
        defenses=methods.choices("defense", "defenses", file.defenses),
        attacks=methods.choices("attack", "attacks", file.attacks),
        baselines=methods.choices("attack", "baselines", file.baselines),
        reported=reported,
        left_out=left_out,
    )
    methods.check_others(suite)
    methods.check_reported(reported)
    return methods.with_surrogates(suite)


def _seeds(file: SuiteFile, places: Places) -> tuple[int, ...]:
    seeds = tuple(range(file.seeds)) if isinstance(file.seeds, int) else file.seeds
    if not seeds or len(set(seeds)) < len(seeds):
        sentence = f"seeds must be a number of seeds or a list of different ones, not {list(seeds)}."
        raise places.error(("seeds",), sentence)
    return seeds
