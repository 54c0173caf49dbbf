"""The queue: which stages of a plan can run now, and which goes first."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from graphlib import TopologicalSorter
from heapq import heapify, heappop, heappush

from kdbench.engine.plan import Stage
from kdbench.engine.store import KINDS

Keys = tuple[str, ...]


class StageQueue:
    """Stages that are still to be done, each given out once all stages it builds on are done.

    What many others build on goes first, evaluations, which nothing builds on, last.
    """

    def __init__(self, stages: Mapping[str, Stage], fuse: int) -> None:
        """stages: those to be done. fuse: how many stages of a fusible group a worker is given at most."""
        self._stages, self._fuse = stages, fuse
        self._dependents: Counter[str] = Counter()
        self._sorter: TopologicalSorter[str] = TopologicalSorter()
        for key, stage in stages.items():
            inputs = [name for name in stage.inputs if name in stages]
            self._dependents.update(inputs)
            self._sorter.add(key, *inputs)
        self._sorter.prepare()
        self._ready: list[tuple[int, int, int, str]] = []  # a heap
        self._order = itertools.count()
        self._push_ready()

    def __len__(self) -> int:
        """How many stages could be given out now."""
        return len(self._ready)

    def push(self, key: str) -> None:
        """Put a stage in that is ready, for another attempt too."""
        kind = KINDS.index(self._stages[key].kind)
        heappush(self._ready, (kind, -self._dependents[key], next(self._order), key))

    def done(self, key: str) -> None:
        """A stage is done: what waited for it alone is ready now."""
        self._sorter.done(key)
        self._push_ready()

    def pop(self, slots: int) -> Keys:
        """The next stage, with as many of its fusible group as run with it and are not for the other free slots."""
        first = heappop(self._ready)[-1]
        group = self._stages[first].fusible_group if self._fuse > 1 else ""
        if not group:
            return (first,)
        others = sorted(entry for entry in self._ready if self._stages[entry[-1]].fusible_group == group)
        taken = set(others[: min(self._fuse, math.ceil((len(others) + 1) / slots)) - 1])
        self._ready = [entry for entry in self._ready if entry not in taken]
        heapify(self._ready)
        return (first, *(entry[-1] for entry in sorted(taken)))

    def above(self, key: str) -> list[str]:
        """All stages that build on `key`, directly or not, in the order of the plan."""
        found = {key: None}
        for name, stage in self._stages.items():
            if any(one in found for one in stage.inputs):
                found[name] = None
        return list(found)[1:]

    def _push_ready(self) -> None:
        for key in self._sorter.get_ready():
            self.push(key)
