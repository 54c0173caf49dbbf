"""The time table of a run: a line a stage, a line a kind, and what scheduling and publishing cost beyond the stages."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kdbench.engine.manifest import Manifest
from kdbench.engine.plan import Stage
from kdbench.engine.scheduler import Outcome
from kdbench.engine.store import KINDS, Store

UNKNOWN = "–"
HEAD = ("kind", "stage", "seconds", "images/s", "of bare loop", "overhead")


@dataclass(frozen=True)
class TimingRow:
    """A stage, or several: the seconds of the stage itself, and what the scheduler waited beyond (None: finished before).

    images went through trainings in `training_seconds`. Where a bare loop over the same modules was measured, those
    trainings took `compared_seconds`, and the bare loop would have taken `bare_seconds` (None: none was measured).
    """

    kind: str
    name: str
    seconds: float
    overhead: float | None = None
    images: int = 0
    training_seconds: float = 0.0
    compared_seconds: float = 0.0
    bare_seconds: float | None = None

    @classmethod
    def of(cls, stage: Stage, manifest: Manifest, waited: float | None) -> "TimingRow":
        """The line of a finished stage, as its manifest says; waited: by the scheduler, if it ran now."""
        done = manifest.throughput
        overhead = None if waited is None else waited - manifest.seconds
        compared = done.compared_seconds, done.bare_seconds
        return cls(stage.kind, stage.title, manifest.seconds, overhead, done.images, done.seconds, *compared)

    @classmethod
    def total(cls, lines: Sequence["TimingRow"], kind: str, name: str) -> "TimingRow":
        """Several lines in one."""
        overheads = [line.overhead for line in lines if line.overhead is not None]
        bare = [line.bare_seconds for line in lines if line.bare_seconds is not None]
        return cls(
            kind,
            name,
            sum(line.seconds for line in lines),
            sum(overheads) if overheads else None,
            sum(line.images for line in lines),
            sum(line.training_seconds for line in lines),
            sum(line.compared_seconds for line in lines),
            sum(bare) if bare else None,
        )

    def cells(self) -> tuple[str, ...]:
        """What stands in the columns of `HEAD`."""
        speed = f"{self.images / self.training_seconds:.0f}" if self.training_seconds else UNKNOWN
        share = (
            f"{self.bare_seconds / self.compared_seconds:.0%}"
            if self.bare_seconds is not None and self.compared_seconds
            else UNKNOWN
        )
        overhead = f"{self.overhead:.2f}" if self.overhead is not None else UNKNOWN
        return self.kind, self.name, f"{self.seconds:.2f}", speed, share, overhead


def timing_table(stages: Iterable[Stage], store: Store, outcome: Outcome, wall: float) -> str:
    """The time table of a run that took `wall` seconds: its finished stages, the totals of each kind, and a summary.

    overhead: what the scheduler waited for a stage beyond the stage's own seconds: starting a worker, reading its
    specification, publishing, noticing the end. Stages that were finished before show what was recorded then.
    """
    lines = [
        TimingRow.of(stage, store.manifest(stage.key), outcome.seconds.get(stage.key))
        for stage in stages
        if stage.key not in outcome.problems
    ]
    rows = [HEAD, *(line.cells() for line in lines), *(total.cells() for total in _totals(lines))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join([*(_row(row, widths) for row in rows), _summary(lines, wall)])


def _totals(lines: Sequence[TimingRow]) -> Iterator[TimingRow]:
    for kind in KINDS:
        of_kind = [line for line in lines if line.kind == kind]
        if of_kind:
            yield TimingRow.total(of_kind, kind, f"all {len(of_kind)}")


def _row(row: Sequence[str], widths: Sequence[int]) -> str:
    words = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
    numbers = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*words, *numbers])


def _summary(lines: Sequence[TimingRow], wall: float) -> str:
    """How long the run took, and how the seconds of its stages are split over the kinds."""
    now = [line for line in lines if line.overhead is not None]
    total = sum(line.seconds for line in now)
    split = ", ".join(
        f"{kind} {100 * sum(line.seconds for line in now if line.kind == kind) / total:.0f}%"
        for kind in KINDS
        if total and any(line.kind == kind for line in now)
    )
    head = f"{wall:.1f} s on the wall; {len(now)} stages run now, {total:.1f} s in the workers"
    return f"{head} ({split})" if split else head
