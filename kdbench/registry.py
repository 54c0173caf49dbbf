"""Names -> classes, by entry points. Built-ins enter by the same groups as plugins; each is imported when it is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kdbench.errors import KdbenchError, unknown

KINDS = {
    "defense": "kdbench.defenses",
    "attack": "kdbench.attacks",
    "model": "kdbench.models",
    "dataset": "kdbench.datasets",
}


@dataclass(frozen=True)
class Entry:
    """A registered name and where it comes from."""

    kind: str
    name: str
    target: str
    origin: str
    point: EntryPoint

    def load(self) -> Any:
        """The class or function. Raises `KdbenchError` naming the entry and the reason when its import fails."""
        try:
            return self.point.load()
        except Exception as error:  # whatever a plugin's import raises, it costs that plugin only
            reason = f"{type(error).__name__}: {error}"
            raise KdbenchError(
                f"The {self.kind} '{self.name}' of {self.origin} cannot be imported ({reason}).{_cure(error)}"
            ) from error


def names(kind: str) -> list[str]:
    """All registered names of a kind, sorted; imports nothing of them."""
    return sorted(_entries(kind))


def entries(kind: str) -> list[Entry]:
    """All registrations of a kind, sorted by name."""
    found = _entries(kind)
    return [found[name] for name in sorted(found)]


def find(kind: str, name: str) -> Entry:
    """The registration of `name`; raises `KdbenchError` with the nearest known name."""
    found = _entries(kind)
    if name not in found:
        raise unknown(kind, name, found)
    return found[name]


def load(kind: str, name: str) -> Any:
    """The class or function registered as `name`."""
    return find(kind, name).load()


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


def _cure(error: Exception) -> str:
    # A wheel installed elsewhere plus `python -m kdbench` inside the checkout finds the checkout's kdbench without its wings.
    missing = isinstance(error, ModuleNotFoundError) and str(error.name).startswith(
        ("kdbench.defenses", "kdbench.attacks")
    )
    return " Inside a checkout, run pip install -e ." if missing else ""
