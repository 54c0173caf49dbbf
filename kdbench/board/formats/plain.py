"""Values as files hold them: numbers as numbers, an estimate in three parts."""

from kdbench.board.document import Value
from kdbench.board.intervals import Estimate

DIGITS = 6

Plain = str | int | float | None
Parts = dict[str, Plain]
"""The parts of an estimate: mean, half_width (of the 95 % interval; None with one seed) and n."""


def plain_value(value: Value) -> Plain | Parts:
    """A value as JSON has it. Fractions are rounded to 6 digits."""
    return estimate_parts(value) if isinstance(value, Estimate) else _rounded(value)


def estimate_parts(value: Estimate) -> Parts:
    """The parts of an estimate, in their order."""
    return {"mean": _rounded(value.mean), "half_width": _rounded(value.half_width), "n": value.n}


def _rounded(value: Plain) -> Plain:
    return round(value, DIGITS) + 0.0 if isinstance(value, float) else value  # + 0.0: no negative zero
