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
    """A method that was run with several values of `field`, and perhaps of `other`; `methods`: by (value, other's value)."""

    role: str
    method: str
    field: str
    other: str | None
    methods: Mapping[tuple[Value, Value | None], MethodRecord]

    @property
    def values(self) -> list[Value]:
        """The values of the field, ascending."""
        return sorted({value for value, _ in self.methods}, key=_order)

    @property
    def others(self) -> list[Value | None]:
        """The values of the other field, ascending; [None] where only one varies."""
        return sorted({other for _, other in self.methods}, key=_order)

    @property
    def name(self) -> str:
        """What the plot is called."""
        return f"{self.method}-{self.field}"

    def along(self, other: Value | None, measure: Callable[[str], Estimate | None]) -> list[Estimate | None]:
        """What `measure` says of the method's name at each value of the field, for one value of the other."""
        methods = [self.methods.get((value, other)) for value in self.values]
        return [measure(method.name) if method else None for method in methods]


def sweeps(role: str, records: Iterable[MethodRecord]) -> list[Swept]:
    """The sweeps among the methods of one role: those that differ in one or two plain fields, by name."""
    by_method: dict[str, list[MethodRecord]] = defaultdict(list)
    for record in records:
        by_method[record.method].append(record)
    found = [_swept(role, method, own) for method, own in sorted(by_method.items())]
    return [swept for swept in found if swept and len(swept.values) > 1]


def _swept(role: str, method: str, records: Sequence[MethodRecord]) -> Swept | None:
    names = list(records[0].fields)
    values = {name: {_value(record.fields.get(name)) for record in records} for name in names}
    varying = sorted((name for name in names if len(values[name]) > 1), key=lambda name: -len(values[name]))
    if not 1 <= len(varying) <= 2:
        return None
    field, other = varying[0], varying[1] if len(varying) > 1 else None
    placed = {(_value(r.fields[field]), _value(r.fields[other]) if other else None): r for r in records}
    if other and len(placed) == len(values[other]):
        # The two vary together: panels by the second would hold a point each.
        other, placed = None, {(value, None): record for (value, _), record in placed.items()}
    # Two lists of one length, or what no field tells apart, have one place for several methods.
    return Swept(role, method, field, other, placed) if len(placed) == len(records) else None


def _value(value: Any) -> Value:
    """A field as a point on an axis: a list by its length, what is no number by its text."""
    if isinstance(value, list | tuple):
        return float(len(value))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _order(value: Value | None) -> tuple[bool, float, str]:
    number = isinstance(value, float)
    return (not number, value if isinstance(value, float) else 0.0, str(value))
