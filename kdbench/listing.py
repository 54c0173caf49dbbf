"""What is registered and which suites ship: `kdbench list` and `kdbench show`."""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from kdbench import registry
from kdbench.errors import KdbenchError
from kdbench.game.fields import hints, plain
from kdbench.game.methods import Attack, Defense
from kdbench.game.threat import Access
from kdbench.suites.reader import load
from kdbench.suites.shipped import shipped

PLURALS = {
    "defense": "defenses",
    "attack": "attacks",
    "model": "models",
    "dataset": "datasets",
    "victim": "victims",
    "executor": "executors",
}


def listing(plural: str | None = None) -> list[str]:
    """A line for each registered name, with its origin and its first sentence; a heading a kind when all are listed.

    A plugin that cannot be imported is a warning and nothing more.
    """
    lines: list[str] = []
    for kind, heading in PLURALS.items():
        if plural in (None, heading):
            lines += [*([f"{heading}:"] if plural is None else []), *_entries(kind)]
    if plural in (None, "suites"):
        lines += [*(["suites:"] if plural is None else []), *_suites()]
    return lines


def describe(kind: str, name: str) -> str:
    """Fields with types and defaults, origin, description and citation, and what it needs of the victim or does to it."""
    if kind == "suite":
        suite = load(name)
        methods = (("defenses", suite.defenses), ("attacks", suite.attacks), ("baselines", suite.baselines))
        scenario = ", ".join(f"{field} {value}" for field, value in plain(suite.scenario).items())
        rows = [f"{kind}: {', '.join(choice.name for choice in choices)}" for kind, choices in methods]
        return "\n".join([f"{name}: {suite.title}", *rows, f"seeds: {len(suite.seeds)}", f"scenario: {scenario}"])
    entry = registry.find(kind, name)
    thing = entry.load()
    parts = [
        f"{name}: {entry.target}, from {entry.origin}",
        _source(thing),
        inspect.getdoc(thing) or "",
        *_access(thing),
    ]
    if dataclasses.is_dataclass(thing) and isinstance(thing, type):
        parts.append("\n".join(["fields:", *(_fields(thing) or ["  none"])]))
    return "\n\n".join(part for part in parts if part)


def _entries(kind: str) -> Iterator[str]:
    entries = registry.entries(kind)
    width = max((len(entry.name) for entry in entries), default=0)
    origins = max((len(entry.origin) for entry in entries), default=0)
    for entry in entries:
        try:
            first = (inspect.getdoc(entry.load()) or "").partition("\n")[0]
        except KdbenchError as error:
            print(f"Warning: {error}", file=sys.stderr)
            continue
        yield f"  {entry.name:{width}}  {entry.origin:{origins}}  {first}"


def _suites() -> Iterator[str]:
    for name in shipped():
        yield f"  {name}  {load(name).title}"


def _source(thing: Any) -> str:
    """The first line of the method's file: what it is, and the paper."""
    module = inspect.getmodule(thing)
    return (inspect.getdoc(module) or "").partition("\n")[0]


def _access(thing: Any) -> Iterator[str]:
    if isinstance(thing, type) and issubclass(thing, Attack):
        nothing = thing.needs is Access.NOTHING
        yield (
            "access: needs nothing of the victim (a no-query baseline)"
            if nothing
            else f"access: needs {thing.needs.name.lower()}"
        )
    if isinstance(thing, type) and issubclass(thing, Defense):
        training = ["at training time"] if thing.harden is not Defense.harden else []
        changed = thing.perturb is not Defense.perturb or thing.serve is not Defense.serve
        answering = ["when answering"] if changed else []
        yield f"acts: {' and '.join(training + answering) or 'never'}" + ("; keeps state" if thing.stateful else "")


def _fields(cls: type) -> list[str]:
    types = hints(cls)
    return [f"  {f.name}: {_type(types[f.name])} = {_default(f)!r}" for f in dataclasses.fields(cls)]


def _default(field: "dataclasses.Field[Any]") -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _type(hint: Any) -> str:
    """A type in words: the bounds of an annotated one, the values of a literal."""
    if get_origin(hint) is Annotated:
        base, *bounds = get_args(hint)
        return " ".join([_type(base), *(_bound(bound) for bound in bounds)])
    if get_origin(hint) is None:
        return str(getattr(hint, "__name__", hint))
    return str(hint).replace("typing.", "")


def _bound(bound: object) -> str:
    match bound:
        case Gt(gt=limit):
            return f"> {limit}"
        case Ge(ge=limit):
            return f">= {limit}"
        case Le(le=limit):
            return f"<= {limit}"
        case Lt(lt=limit):
            return f"< {limit}"
    return str(bound)
