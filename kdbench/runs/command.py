"""What `kdbench run` does; what the command line can do, Python can do."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from kdbench.engine.plan import Plan
from kdbench.engine.store import Store
from kdbench.records import Status
from kdbench.runs.progress import duration, progress_display
from kdbench.runs.recorder import CellCounts
from kdbench.runs.request import Request
from kdbench.runs.session import Session
from kdbench.runs.timing import timing_table
from kdbench.suites import reader
from kdbench.suites.methods import with_undefended

__all__ = ["Request", "describe", "open_session", "run"]

DONE, SOME_FAILED = 0, 1
SAMPLE = 200  # stages whose times are looked up for an estimate


def run(suite: str, request: Request) -> int:
    """Run a suite, write and print its results; or print its plan. The exit code."""
    session = open_session(suite, request)
    start, plan = time.monotonic(), session.plan()
    if request.dry_run:
        print(describe(plan, session.store, session.jobs))
        return DONE
    outcome = session.run_stages(plan)
    seconds = time.monotonic() - start
    code = _finish(session.record(plan, outcome), session.out, plan.suite.left_out)
    if request.profile:
        print(timing_table(plan.stages.values(), session.store, outcome, seconds))
    return code


def open_session(suite: str, request: Request) -> Session:
    """The session of a suite with the changes that are asked for; the undefended victim is always among its defenses."""
    chosen = with_undefended(reader.load(suite, request.tree()))
    return Session(chosen, replace(request, out=request.folder(chosen.name)), progress_display(request.quiet))


def describe(plan: Plan, store: Store, jobs: int) -> str:
    """The plan in words: its unique stages, which of them are cached, the estimated time of the rest, what is left out."""
    finished = store.finished()
    rows = [
        f"{'cached' if key in finished else 'to do':8}{stage.kind:10}{stage.title}"
        for key, stage in plan.stages.items()
    ]
    todo = Counter(stage.kind for key, stage in plan.stages.items() if key not in finished)
    kinds = Counter(stage.kind for stage in plan.stages.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    head = f"{len(plan.cells)} cells, {len(plan.stages)} unique stages ({counts}), {todo.total()} to do"
    times = {kind: _times(plan, store, finished, kind) for kind in todo}
    notes = [_estimate(todo, times, jobs), *filter(None, [plan.suite.left_out])]
    return "\n".join([*rows, head, *notes])


def _estimate(todo: Counter[str], times: dict[str, list[float]], jobs: int) -> str:
    """How long the stages still to do take, as far as stages of their kinds were timed."""
    unknown = [kind for kind, found in times.items() if not found]
    known = sum(count * sum(times[kind]) / len(times[kind]) for kind, count in todo.items() if times[kind])
    estimate = f"estimated time: {duration(known / jobs)} with {jobs} workers"
    return estimate + (f", and stages never timed in this store: {', '.join(unknown)}" if unknown else "")


def _times(plan: Plan, store: Store, finished: set[str], kind: str) -> list[float]:
    """The seconds that finished stages of a kind took: the plan's own, else any; enough of them for a mean."""
    done = sorted(key for key in finished if key.startswith(f"{kind}/"))
    own = [key for key in done if key in plan.stages]
    return [store.manifest(key).seconds for key in (own or done)[:SAMPLE]]


def _finish(cell_counts: CellCounts, out: Path, left_out: str) -> int:
    from kdbench.board.report import write_all  # a second of imports that nobody waits for before the run

    print(write_all(out))
    if left_out:
        print(left_out)
    failed = {reason: count for (status, reason), count in cell_counts.items() if status is Status.FAILED}
    for reason, count in failed.items():
        print(f"{count} cells failed: {reason}")
    print(f"Results and leaderboards: {out}\nPlots: {out / 'plots'}")
    return SOME_FAILED if failed else DONE
