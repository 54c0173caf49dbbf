"""Columns that several tables have. Those of a metric take their heading, unit and meaning from `kdbench.metrics`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from kdbench.board.document import Column, Kind, Value
from kdbench.board.pairing import Pairing, ServedVictim
from kdbench.board.study import AttackRow
from kdbench.metrics import METRICS, Unit
from kdbench.records import Cell, Status

R = TypeVar("R")

_KINDS: Mapping[Unit, Kind] = {Unit.FRACTION: Kind.SHARE, Unit.POINTS: Kind.DIFFERENCE, Unit.COUNT: Kind.COUNT}
_SUFFIXES: Mapping[Kind, str] = {Kind.SHARE: " (%)", Kind.DIFFERENCE: " (points)"}


def of_metric(name: str, of: Callable[[R], Value], drop_order: int = 0, heading: str = "") -> Column[R]:
    """A column of a declared metric; heading: what to write instead of the metric's own."""
    metric = METRICS[name]
    kind = _KINDS.get(metric.unit, Kind.NORM)
    return Column(name, (heading or metric.heading) + _SUFFIXES.get(kind, ""), kind, metric.meaning, of, drop_order)


def of_victim(name: str, of: Callable[[R], ServedVictim], drop_order: int = 0) -> Column[R]:
    """A column of a declared metric of the victim behind a defense."""
    return of_metric(name, lambda row: of(row).mean(name), drop_order)


def of_student(name: str, of: Callable[[R], Pairing], drop_order: int = 0) -> Column[R]:
    """A column of a declared metric of the students of a pairing."""
    return of_metric(name, lambda row: of(row).mean(name), drop_order)


def measured(cells: Iterable[Cell], names: Iterable[str]) -> list[str]:
    """Those of the metrics that any of the cells has."""
    found = {name for cell in cells for name in cell.metrics}
    return [name for name in names if name in found]


def student(of: Callable[[R], str]) -> Column[R]:
    """Whose board it is. People read it in the title."""
    return Column("student", "Student", Kind.TEXT, "the student's network", of, visible=False)


def scenario(of: Callable[[R], str]) -> Column[R]:
    """Under which scenario. People read it in the title."""
    return Column("scenario", "Scenario", Kind.TEXT, "what the attacker sees, asks and owns", of, visible=False)


def defense(of: Callable[[R], str]) -> Column[R]:
    """The defense."""
    return Column("defense", "Defense", Kind.TEXT, "the defense's name in the suite", of)


def method(of: Callable[[R], str]) -> Column[R]:
    """The registered method. People read it in the report."""
    return Column("method", "Method", Kind.TEXT, "the registered method behind the name", of, visible=False)


def attack(of: Callable[[R], str], about: str = "the attack's name in the suite") -> Column[R]:
    """The attack."""
    return Column("attack", "Attack", Kind.TEXT, about, of)


def fraction(of: Callable[[R], Value]) -> Column[R]:
    """The data subset."""
    return Column("fraction", "Share of the data", Kind.TEXT, "share of the attacker's images that are used", of)


def rank(of: Callable[[R], Value], number: str) -> Column[R]:
    """The rank; number: what it is made of."""
    return Column(
        "rank", "Rank", Kind.WHOLE, f"1 + the number of defenses whose interval of the {number} lies wholly above", of
    )


def utility_loss(of: Callable[[R], Value], drop_order: int = 0) -> Column[R]:
    """The utility loss."""
    about = "test accuracy of the undefended victim's answers minus that of this defense's"
    return Column("utility_loss", "Utility loss (points)", Kind.DIFFERENCE, about, of, drop_order)


def student_acc(of: Callable[[R], AttackRow | None]) -> Column[R]:
    """The accuracy of the student."""
    return of_metric("student_acc", _of(of, lambda row: row.pairing.mean("student_acc")))


def protection(of: Callable[[R], Value]) -> Column[R]:
    """What a defense takes from the attacker."""
    about = "student accuracy on the undefended victim minus here, paired by seed"
    return Column("protection", "Protection (points)", Kind.DIFFERENCE, about, of)


def gains(of: Callable[[R], AttackRow | None]) -> Sequence[Column[R]]:
    """What an attacker gains, how faithful the student is, and what it took."""
    return (
        Column(
            "gain",
            "Gain (points)",
            Kind.DIFFERENCE,
            "student accuracy minus that of the best no-query baseline on the same data subset",
            _of(of, lambda row: row.study.gain(row.pairing)),
            drop_order=2,
        ),
        Column(
            "gain_over_labels",
            "Gain over labels (points)",
            Kind.DIFFERENCE,
            "student accuracy minus that of the attack that learns from labels only, on the same defense and data subset",
            _of(of, lambda row: row.study.gain_over_labels(row.pairing)),
            drop_order=4,
        ),
        of_metric("fidelity", _of(of, lambda row: row.pairing.mean("fidelity")), drop_order=5),
        of_metric("queries", _of(of, lambda row: row.pairing.mean("queries")), drop_order=5),
    )


def cells(of: Callable[[R], AttackRow]) -> Column[R]:
    """How the cells of a pairing ended."""
    return Column("cells", "Cells", Kind.TEXT, "how the cells ended", lambda row: _endings(of(row)))


def _of(of: Callable[[R], AttackRow | None], value: Callable[[AttackRow], Value]) -> Callable[[R], Value]:
    def column(subject: R) -> Value:
        row = of(subject)
        return value(row) if row else None

    return column


def _endings(row: AttackRow) -> str:
    counts = {status: row.pairing.count(status) for status in Status}
    return ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)
