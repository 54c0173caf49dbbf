"""Names -> classes, by entry points. Built-ins enter by the same groups as plugins; each is imported when it is asked for.

A name may carry an argument, `NAME:ARGUMENT`. `MODULE:CALLABLE` is a network in a module of the user's own, which is not
registered.
"""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, wraps
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from kdbench.errors import KdbenchError, unknown

KINDS = {
    "defense": "kdbench.defenses",
    "attack": "kdbench.attacks",
    "model": "kdbench.models",
    "dataset": "kdbench.datasets",
    "victim": "kdbench.victims",
    "executor": "kdbench.executors",
}


@runtime_checkable
class Parametrised(Protocol):
    """A registered class or object that takes an argument, such as `torchvision:NAME`, and makes an entry of it.

    argument: the word that stands for it in messages and lists, in capitals: NAME, PATH.
    """

    argument: str

    def from_argument(self, argument: str) -> Any:
        """The class or function behind `NAME:ARGUMENT`. Raises `KdbenchError` when there is none."""


@dataclass(frozen=True)
class Entry:
    """A name and where it comes from. argument: what stands behind the colon, None where there is none."""

    kind: str
    name: str
    target: str
    origin: str
    point: EntryPoint
    argument: str | None = None

    def load(self) -> Any:
        """The class or function; without an argument, a parametrised entry itself.

        Raises `KdbenchError` naming the entry and the reason when its import fails or the argument is wrong.
        """
        thing = self._imported()
        if self.argument is None:
            return thing
        name = self.name.partition(":")[0]
        if not isinstance(thing, Parametrised):
            own = f" A module of your own named '{name}' needs another name." if self.kind == "model" else ""
            raise KdbenchError(f"The {self.kind} '{name}' takes no argument: '{self.name}' is nothing.{own}")
        if not self.argument:
            raise _bare(self.kind, name, thing)
        return thing.from_argument(self.argument)

    def _imported(self) -> Any:
        try:
            return self.point.load()
        except Exception as error:  # whatever a plugin's import raises, it costs that plugin only
            reason = f"{type(error).__name__}: {error}"
            raise KdbenchError(
                f"The {self.kind} '{self.point.name}' of {self.origin} cannot be imported ({reason}).{_cure(error)}"
            ) from error


@dataclass(frozen=True)
class UserModule(Entry):
    """A network that nobody registered: MODULE:CALLABLE, in a module of the current folder or an installed one."""

    def load(self) -> Callable[[tuple[int, int, int], int], Any]:
        """The person's factory: (shape, classes) -> `torch.nn.Module`.

        Raises `KdbenchError` when there is no such module or nothing of that name in it that can be called.
        """
        factory = self._factory()
        if not callable(factory):
            raise KdbenchError(
                f"The model '{self.name}' is of type {type(factory).__name__}, not a function (shape, classes)."
            )

        @wraps(factory, updated=())
        def make(shape: tuple[int, int, int], classes: int) -> Any:
            from torch import nn  # heavy, and there already when a network is made

            network = factory(shape, classes)
            if not isinstance(network, nn.Module):
                raise KdbenchError(f"The model '{self.name}' made a {type(network).__name__}, not a torch.nn.Module.")
            return network

        make.__module__ = self.point.module  # whose source counts, even where it imports the function from elsewhere
        return make

    def _factory(self) -> Any:
        module = self._module()
        found = vars(module)
        if self.point.attr not in found:
            made = [name for name, value in found.items() if inspect.getmodule(value) is module and callable(value)]
            raise unknown("function", self.point.attr, made, f"the module '{self.point.module}' ({module.__file__})")
        return found[self.point.attr]

    def _module(self) -> ModuleType:
        name, folder = self.point.module, os.getcwd()
        # A console script does not look there. It comes last, so that a file there hides nothing that is installed.
        if folder not in sys.path:
            sys.path.append(folder)
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        except Exception as error:  # whatever the import of somebody's module raises
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                raise self._missing(folder) from None
            reason = f"{type(error).__name__}: {error}"
            raise KdbenchError(f"The module '{name}' of the model '{self.name}' fails to import ({reason}).") from error

    def _missing(self, folder: str) -> KdbenchError:
        near = difflib.get_close_matches(self.point.module, names(self.kind), n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        return KdbenchError(
            f"There is no model '{self.name}': '{self.point.module}' is neither a registered network nor a module in "
            f"{folder} or an installed one.{guess}"
        )


def names(kind: str) -> list[str]:
    """All registered names of a kind, sorted; imports nothing of them."""
    return sorted(_entries(kind))


def entries(kind: str) -> list[Entry]:
    """All registrations of a kind, sorted by name."""
    found = _entries(kind)
    return [found[name] for name in sorted(found)]


def find(kind: str, name: str) -> Entry:
    """The registration of `name`, which may be `NAME:ARGUMENT`, and for networks `MODULE:CALLABLE`.

    Raises `KdbenchError` with the nearest known name. An argument is checked, so that a wrong one is found here, too.
    """
    found = _entries(kind)
    head, colon, argument = name.partition(":")
    if head in found:
        entry = replace(found[head], name=name, argument=argument) if colon else found[head]
    elif colon and kind == "model":
        entry = _user_module(kind, name)
    else:
        raise unknown(kind, head, found)
    if colon:
        entry.load()
    return entry


def load(kind: str, name: str) -> Any:
    """The class or function behind `name`. Raises `KdbenchError` for a parametrised entry without argument, too."""
    thing = find(kind, name).load()
    if isinstance(thing, Parametrised) and ":" not in name:
        raise _bare(kind, name, thing)
    return thing


def _bare(kind: str, name: str, entry: Parametrised) -> KdbenchError:
    return KdbenchError(f"The {kind} '{name}' needs an argument: {name}:{entry.argument}.")


@cache
def _entries(kind: str) -> dict[str, Entry]:
    return unique(kind, entry_points(group=KINDS[kind]))


def unique(kind: str, points: Iterable[EntryPoint]) -> dict[str, Entry]:
    """Entries by name; raises `KdbenchError` when two distributions claim one name for different things."""
    found: dict[str, Entry] = {}
    for point in points:
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
        entry = Entry(kind, point.name, point.value, origin, point)
        other = found.setdefault(point.name, entry)
        if other.target != entry.target:
            raise KdbenchError(
                f"Two distributions register the {kind} '{point.name}': {other.origin} and {origin}. Uninstall one."
            )
    return found


def _user_module(kind: str, name: str) -> UserModule:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise KdbenchError(f"'{name}' is no name of a network: a module and a function in it are, such as nets:small.")
    return UserModule(kind, name, name, "your own code", EntryPoint(name, name, KINDS[kind]))


def _cure(error: Exception) -> str:
    # `python -m kdbench` inside a checkout finds the checkout's kdbench, even where a wheel is installed elsewhere. The
    # methods lie beside it there, and setup.cfg maps them into the package only on installation.
    missing = isinstance(error, ModuleNotFoundError) and str(error.name).startswith(
        ("kdbench.defenses", "kdbench.attacks")
    )
    return " Inside a checkout, run pip install -e ." if missing else ""
