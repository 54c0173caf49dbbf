"""Which methods of a results folder are one method with several values of a field, and what was measured along them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdbench.board.intervals import Estimate
from kdbench.records import MethodRecord

Value = float | str


@dataclass(frozen=True)
class Swept:
    """A method played with several values of `field`, and perhaps of `other` too; the players by (value, other's value)."""

    role: str
    method: str
    field: str
    other: str | None
    players: Mapping[tuple[Value, Value | None], MethodRecord]

    @property
    def values(self) -> list[Value]:
        """The values of the field, ascending."""
        return sorted({value for value, _ in self.players}, key=_order)

    @property
    def others(self) -> list[Value | None]:
        """The values of the other field, ascending; [None] where only one varies."""
        return sorted({other for _, other in self.players}, key=_order)

    @property
    def name(self) -> str:
        """What the plot is called."""
        return f"{self.method}-{self.field}"

    def along(self, other: Value | None, measure: Callable[[str], Estimate | None]) -> list[Estimate | None]:
        """What `measure` says of the label at each value of the field, for one value of the other."""
        players = [self.players.get((value, other)) for value in self.values]
        return [measure(player.name) if player else None for player in players]


def sweeps(role: str, players: Iterable[MethodRecord]) -> list[Swept]:
    """The sweeps among the players of one role: methods that differ in one or two plain fields, by name."""
    by_method: dict[str, list[MethodRecord]] = defaultdict(list)
    for player in players:
        by_method[player.method].append(player)
    found = [_swept(role, method, own) for method, own in sorted(by_method.items())]
    return [swept for swept in found if swept and len(swept.values) > 1]


def _swept(role: str, method: str, players: Sequence[MethodRecord]) -> Swept | None:
    names = list(players[0].fields)
    values = {name: {_value(p.fields.get(name)) for p in players} for name in names}
    varying = sorted((name for name in names if len(values[name]) > 1), key=lambda name: -len(values[name]))
    if not 1 <= len(varying) <= 2:
        return None
    field, other = varying[0], varying[1] if len(varying) > 1 else None
    named = {(_value(p.fields[field]), _value(p.fields[other]) if other else None): p for p in players}
    if other and len(named) == len(values[other]):
        # The two vary together: panels by the second would hold a point each.
        other, named = None, {(value, None): p for (value, _), p in named.items()}
    # Two lists of one length, or what no field tells apart, have one place for several players.
    return Swept(role, method, field, other, named) if len(named) == len(players) else None


def _value(value: Any) -> Value:
    """A field as a point on an axis: a list by its length, what is no number by its text."""
    if isinstance(value, list | tuple):
        return float(len(value))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _order(value: Value | None) -> tuple[bool, float, str]:
    number = isinstance(value, float)
    return (not number, value if isinstance(value, float) else 0.0, str(value))
