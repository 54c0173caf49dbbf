"""Ratios of times within one run: the candidates take turns, so that a machine that slows down slows them all down."""

import statistics
import time
from collections.abc import Callable, Mapping

Seconds = dict[str, float]


def take_turns(candidates: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Median seconds of each candidate over `rounds` rounds, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
