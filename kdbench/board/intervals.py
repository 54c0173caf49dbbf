"""Means over seeds with their 95 % intervals, differences paired by seed, and ranks that intervals can tell apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

CONFIDENCE = 0.95
DIGITS = 12  # accuracies are counts: what differs after the 12th digit is the rounding of a subtraction, not a result

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and the half-width of its interval; one seed has none (half is None)."""

    mean: float
    half_width: float | None
    n: int

    @property
    def low(self) -> float:
        """The lower end; the mean itself where there is no interval."""
        return self.mean - (self.half_width or 0)

    @property
    def high(self) -> float:
        """The upper end; the mean itself where there is no interval."""
        return self.mean + (self.half_width or 0)


def estimate(values: BySeed) -> Estimate | None:
    """Mean and Student's t interval of `values`, one a seed; None without values."""
    if not values:
        return None
    numbers = [values[seed] for seed in sorted(values)]
    n = len(numbers)
    half_width = round(_quantile(n - 1) * stdev(numbers) / sqrt(n), DIGITS) if n > 1 else None
    return Estimate(round(fmean(numbers), DIGITS), half_width, n)


def paired(first: BySeed, second: BySeed) -> dict[int, float]:
    """`first` - `second` for the seeds that both have."""
    return {seed: round(first[seed] - second[seed], DIGITS) for seed in sorted(first.keys() & second.keys())}


def ranks(estimates: Sequence[Estimate | None]) -> list[int | None]:
    """For each: 1 + the number of others whose interval lies wholly above its own; overlapping ones may share a rank.

    Without any interval nobody can be told apart: all share rank 1. Where some have one, those without get no rank,
    so that losing seeds never improves a rank.
    """
    if all(e is None or e.half_width is None for e in estimates):
        return [None if e is None else 1 for e in estimates]
    known = [e for e in estimates if e is not None and e.half_width is not None]
    return [None if e is None or e.half_width is None else 1 + sum(k.low > e.high for k in known) for e in estimates]


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
