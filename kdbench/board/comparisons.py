"""Who is ahead of whom: ranks that intervals can tell apart, and the Pareto front."""

from collections.abc import Iterable, Sequence

from kdbench.board.intervals import Estimate

Point = tuple[float, float]
"""(cost, value): less of the first and more of the second is better."""


def ranks(estimates: Sequence[Estimate | None]) -> list[int | None]:
    """For each: 1 + the number of others whose interval lies wholly above its own; overlapping ones may share a rank.

    Without any interval nobody can be told apart: all share rank 1. Where some have one, those without get no rank,
    so that losing seeds never improves a rank.
    """
    if all(e is None or e.half_width is None for e in estimates):
        return [None if e is None else 1 for e in estimates]
    known = [e for e in estimates if e is not None and e.half_width is not None]
    return [None if e is None or e.half_width is None else 1 + sum(k.low > e.high for k in known) for e in estimates]


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one equals or beats in value at the same cost or less, by rising cost."""
    front: list[Point] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front
