"""Progress of a run: a live display on a terminal, plain lines elsewhere."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kdbench.engine.plan import Stage
from kdbench.engine.scheduler import ProgressDisplay

PLAIN_SECONDS = 10  # between two lines about what is running
ROWS = 12


def progress_display(quiet: bool = False) -> ProgressDisplay:
    """The display that suits the terminal. It writes to standard error: standard output is for results."""
    console = Console(stderr=True)
    if quiet:
        return ProgressDisplay()
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


@dataclass
class _Tally:
    """How far a run is, and an estimate of what is left from the stages finished so far; all by kind of stage."""

    todo: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, stages: Mapping[str, Stage]) -> "_Tally":
        """The tally of a run that has these stages still to do."""
        return cls(Counter(stage.kind for stage in stages.values()))

    def add(self, stage: Stage, seconds: float) -> None:
        self.todo[stage.kind] -= 1
        self.done[stage.kind] += 1
        self.seconds[stage.kind] += seconds

    def drop(self, stages: list[Stage]) -> None:
        self.todo.subtract(stage.kind for stage in stages)

    def left(self) -> str:
        """Roughly how long the rest takes, at the throughput so far; empty before anything is known."""
        if not self.done:
            return ""
        remaining = sum(count * self._estimate(kind) for kind, count in self.todo.items())
        # Stage seconds a second: how many workers are busy on average.
        throughput = sum(self.seconds.values()) / max(time.monotonic() - self.since, 1e-9)
        return f"about {duration(remaining / max(throughput, 1e-9))} left"

    def _estimate(self, kind: str) -> float:
        """Seconds of a stage of this kind: the mean of its kind, or of all kinds while none of its kind is finished."""
        if self.done[kind]:
            return self.seconds[kind] / self.done[kind]
        return sum(self.seconds.values()) / self.done.total()


class PlainProgress(ProgressDisplay):
    """A line for each stage that ends, and one about the running stages when nothing ended for a while."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally = _Tally()
        self._total, self._printed = 0, time.monotonic()

    def begin(self, stages: Mapping[str, Stage], cached: int) -> None:
        """Print how many stages there are to do."""
        self._tally, self._total = _Tally.of(stages), len(stages)
        if stages:
            self._print(f"{len(stages)} stages to do, {cached} finished before")

    def ended(self, stage: Stage, seconds: float, problem: str) -> None:
        """Print what ended, how long it took and what is left."""
        self._tally.add(stage, seconds)
        outcome = f"FAILED: {problem}" if problem else f"{seconds:.1f} s"
        self._print(f"[{self._tally.done.total()}/{self._total}] {stage.title}: {outcome}; {self._tally.left()}")

    def dropped(self, stages: list[Stage]) -> None:
        """Take them out of the estimate."""
        self._tally.drop(stages)

    def tick(self, running: dict[str, tuple[Stage, float, str]]) -> None:
        """Print what runs, if nothing was printed for a while."""
        if running and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(
                "running: " + "; ".join(f"{s.title} {share:.0%} {text}".rstrip() for s, share, text in running.values())
            )

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress(ProgressDisplay):
    """A bar for the whole run and a line for each running stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally = _Tally()
        columns = (BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("", total=1)
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def begin(self, stages: Mapping[str, Stage], cached: int) -> None:
        """Show the bar."""
        if not stages:
            return
        self._tally = _Tally.of(stages)
        self._bar.reset(self._task, total=len(stages), description=f"{cached} finished before")
        self._live.start()

    def ended(self, stage: Stage, seconds: float, problem: str) -> None:
        """Move the bar; a failure stays on the screen."""
        self._tally.add(stage, seconds)
        self._bar.update(self._task, advance=1, description=self._tally.left())
        if problem:
            self._console.print(f"FAILED {stage.title}: {problem}", style="red", markup=False, highlight=False)

    def dropped(self, stages: list[Stage]) -> None:
        """Take them out of the estimate."""
        self._tally.drop(stages)

    def tick(self, running: dict[str, tuple[Stage, float, str]]) -> None:
        """Draw the running stages again."""
        rows = [Text(f"  {stage.title}  {share:.0%}  {text}", "dim") for stage, share, text in running.values()]
        if self._live.is_started:
            self._live.update(Group(self._bar, *rows[:ROWS]), refresh=True)

    def close(self) -> None:
        """Remove the display, however the run ended."""
        self._live.stop()


def duration(seconds: float) -> str:
    """Seconds as people say them: "80 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
