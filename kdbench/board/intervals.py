"""Means over seeds with their 95 % intervals, and differences paired by seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import sqrt
from statistics import fmean, stdev

CONFIDENCE = 0.95
DIGITS = 12  # accuracies are counts: what differs after the 12th digit is the rounding of a subtraction, not a result

BySeed = Mapping[int, float]
"""One value a seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and the half-width of its interval; with one seed it is None."""

    mean: float
    half_width: float | None
    n: int

    @property
    def surely_above_0(self) -> bool:
        """Whether the interval lies wholly above 0. One seed proves nothing."""
        return self.half_width is not None and self.low > 0

    @property
    def surely_below_0(self) -> bool:
        """Whether the interval lies wholly below 0. One seed proves nothing."""
        return self.half_width is not None and self.high < 0

    @property
    def low(self) -> float:
        """The lower end; the mean itself where there is no interval."""
        return self.mean - (self.half_width or 0)

    @property
    def high(self) -> float:
        """The upper end; the mean itself where there is no interval."""
        return self.mean + (self.half_width or 0)


def estimate(values: BySeed) -> Estimate | None:
    """The mean and the interval of Student's t distribution; None without values."""
    if not values:
        return None
    numbers = [values[seed] for seed in sorted(values)]
    n = len(numbers)
    half_width = round(_quantile(n - 1) * stdev(numbers) / sqrt(n), DIGITS) if n > 1 else None
    return Estimate(round(fmean(numbers), DIGITS), half_width, n)


def paired(first: BySeed, second: BySeed) -> dict[int, float]:
    """`first` - `second` for the seeds that both have."""
    return {seed: round(first[seed] - second[seed], DIGITS) for seed in sorted(first.keys() & second.keys())}


@cache
def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
