"""A board as tables of values, and a value as people read it. How a board becomes text is the business of `formats`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Never, TypeVar

from kdbench.board.intervals import Estimate
from kdbench.board.studies import Facts

MAIN = "ranking"  # the table that a board is about

Value = Estimate | str | int | float | bool | None
R_contra = TypeVar("R_contra", contravariant=True)


class Kind(Enum):
    """What a column holds, and so how a person reads it."""

    TEXT = "text"
    WHOLE = "whole"
    SHARE = "share"
    """A fraction, read in percent."""
    DIFFERENCE = "difference"
    """A difference of fractions, read in signed percentage points."""
    COUNT = "count"
    NORM = "norm"


@dataclass(frozen=True)
class Column(Generic[R_contra]):
    """A column: its name in files, its heading for people, what it says, and how it is filled from the subject of a row.

    drop_order: how readily a narrow terminal leaves it out (0: never). visible: whether people see it at all.
    """

    name: str
    heading: str
    kind: Kind
    about: str
    of: Callable[[R_contra], Value]
    drop_order: int = 0
    visible: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of values, one for each column.

    section: which student or scenario it is about, where a board has several. breaks: texts that stand before the row
    of that index. human_only: it repeats another table's numbers in a shape for reading, and stays out of files.
    folded: too long to be read at once.
    """

    name: str
    title: str
    section: str
    columns: Sequence[Column[Never]]  # of subjects of any kind: once the rows are filled, nobody asks
    rows: Sequence[Sequence[Value]]
    breaks: Mapping[int, str] = field(default_factory=dict)
    human_only: bool = False
    folded: bool = False

    @property
    def full_title(self) -> str:
        """The title with the section."""
        return f"{self.title}: {self.section}" if self.section else self.title


@dataclass(frozen=True)
class Board:
    """A leaderboard: what it is about, its tables, and what must be known to read them."""

    name: str
    title: str
    facts: Facts
    tables: Sequence[Table]
    notes: Sequence[str]


def filled(columns: Sequence[Column[R_contra]], subjects: Iterable[R_contra]) -> list[list[Value]]:
    """The rows of a table: each column's value of each subject."""
    return [[column.of(subject) for column in columns] for subject in subjects]


def text(value: Value, kind: Kind) -> str:
    """A value as people read it: percent with one decimal and the half-width of its interval."""
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        return _estimate(value, kind)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def facts_line(board: Board) -> str:
    """What a board is about, in one sentence."""
    about = board.facts
    seeds = ", ".join(str(seed) for seed in about.seeds)
    return (
        f"Suite {about.suite}, data set {about.dataset} ({about.classes} classes), victim {about.victim}, "
        f"student {', '.join(about.students)}, n = {len(about.seeds)} (seed {seeds})."
    )


def interval_note(seeds: int) -> str:
    """How means over that many seeds are to be read."""
    if seeds == 1:
        return "One seed: no intervals, so nobody can be told apart and all share rank 1; at least 3 seeds are needed."
    few = "" if seeds > 2 else " Two seeds give very wide intervals; at least 3 are needed."
    return f"Means over n seeds ± half of the 95 % t interval; differences are paired by seed.{few}"


def _estimate(value: Estimate, kind: Kind) -> str:
    mean = _number(value.mean, kind)
    if value.half_width is None or (kind is Kind.COUNT and value.half_width == 0):
        return mean
    if kind is Kind.NORM:
        return f"{mean} ± {value.half_width:.1g}"
    return f"{mean} ± {_number(value.half_width, Kind.SHARE if kind is Kind.DIFFERENCE else kind)}"


def _number(value: float, kind: Kind) -> str:
    if kind is Kind.DIFFERENCE:
        return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: no negative zero
    if kind is Kind.SHARE:
        return f"{round(100 * value, 1) + 0.0:.1f}"
    return f"{value:,.0f}" if kind is Kind.COUNT else f"{value:.3g}"
