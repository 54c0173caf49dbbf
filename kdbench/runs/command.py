"""What `kdbench run` and `kdbench status` do; what the command line can do, Python can do."""

import hashlib
import json
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdbench import records
from kdbench.engine.plan import Plan
from kdbench.engine.store import Store
from kdbench.errors import KdbenchError
from kdbench.runs import plan_file
from kdbench.runs.progress import duration, progress_display
from kdbench.runs.recorder import CellCounts
from kdbench.runs.session import Options, Session
from kdbench.runs.timing import profile
from kdbench.suites import reader as suites
from kdbench.suites.methods import with_undefended

DONE, SOME_FAILED = 0, 1
SAMPLE = 200  # stages whose times are looked up for an estimate


@dataclass(frozen=True)
class Request:
    """The options of `kdbench run`: what to change in the suite, and how to run it."""

    defense: Sequence[str] = ()
    attack: Sequence[str] = ()
    dataset: str | None = None
    student: Sequence[str] = ()
    seeds: int | None = None
    robustness: str | None = None
    precision: str | None = None
    changes: Sequence[str] = ()
    device: str = "auto"
    jobs: int | None = None
    threads: int = 1
    compile: bool = False
    fuse: int = 1
    data_dir: Path = Path("data")
    store: Path = Path("runs/store")
    out: Path | None = None
    dry_run: bool = False
    force: bool = False
    quiet: bool = False
    profile: bool = False

    def tree(self) -> dict[str, Any]:
        """What it changes in the benchmark file: dotted path -> value."""
        named = {
            "defenses": list(self.defense),
            "attacks": list(self.attack),
            "dataset": {"name": self.dataset} if self.dataset else None,
            "student.networks": list(self.student),
            "seeds": self.seeds,
            "robustness.level": self.robustness,
            "precision": self.precision,
        }
        chosen = {path: value for path, value in named.items() if value}
        return chosen | dict(_change(text) for text in self.changes)


def run(suite: str, request: Request) -> int:
    """Play a suite, write and print its results; the exit code."""
    changes = request.tree()
    played = with_undefended(suites.load(suite, changes))
    session = Session(played, _options(played.name, changes, request), progress_display(request.quiet))
    if request.dry_run:
        print(describe(session.plan(), session.store, session.jobs))
        return DONE
    start, plan = time.monotonic(), session.plan()
    outcome = session.run_stages(plan)
    seconds = time.monotonic() - start
    code = _finish(session.record(plan, outcome), session.options.out, played.left_out)
    if request.profile:
        print(profile(plan.stages.values(), session.store, outcome, seconds))
    return code


def describe(plan: Plan, store: Store, jobs: int) -> str:
    """The plan in words: its unique stages, which of them are cached, the estimated time of the rest, what is left out."""
    finished = store.finished()
    rows = [
        f"{'cached' if key in finished else 'to do':8}{stage.kind:8}{stage.title}" for key, stage in plan.stages.items()
    ]
    todo = [stage for key, stage in plan.stages.items() if key not in finished]
    kinds = Counter(stage.kind for stage in plan.stages.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    head = f"{len(plan.cells)} cells, {len(plan.stages)} unique stages ({counts}), {len(todo)} to do"
    notes = [_estimate(plan, store, finished, jobs), *filter(None, [plan.suite.left_out])]
    return "\n".join([*rows, head, *notes])


def _estimate(plan: Plan, store: Store, finished: set[str], jobs: int) -> str:
    todo = Counter(stage.kind for key, stage in plan.stages.items() if key not in finished)
    times = {kind: _times(plan, store, finished, kind) for kind in todo}
    unknown = [kind for kind, found in times.items() if not found]
    known = sum(count * sum(times[kind]) / len(times[kind]) for kind, count in todo.items() if times[kind])
    estimate = f"estimated time: {duration(known / jobs)} with {jobs} workers"
    return estimate + (f", and stages never timed in this store: {', '.join(unknown)}" if unknown else "")


def _times(plan: Plan, store: Store, finished: set[str], kind: str) -> list[float]:
    """What finished stages of a kind took: the plan's own, else any; enough of them for a mean."""
    done = sorted(key for key in finished if key.startswith(f"{kind}/"))
    own = [key for key in done if key in plan.stages]
    return [store.manifest(key)["seconds"] for key in (own or done)[:SAMPLE]]


def status(folder: Path) -> str:
    """How far the run that writes to `folder` is, what failed and why, what it cost."""
    lines = _stages(folder)
    if any(records.names(folder)):
        cells = records.read(folder)
        counts = Counter(cell.status.value for cell in cells)
        lines.append(f"cells: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")
        lines += sorted({f"  {c.status.value}: {c.name}: {c.reason}" for c in cells if c.reason})
    return "\n".join(lines)


def _stages(folder: Path) -> list[str]:
    plan, root = plan_file.read(folder), plan_file.store_of(folder)
    if not root.is_dir():
        return [f"{len(plan.cells)} cells planned; the store they were made in is not here"]
    store = Store(root)
    finished = store.finished()
    done = [stage.key for stage in plan.stages if stage.key in finished]
    seconds = sum(store.manifest(key)["seconds"] for key in done)
    lines = [f"stages: {len(done)} of {len(plan.stages)} done, {duration(seconds)} of work"]
    running = [(stage.title, store.progress(stage.key)) for stage in plan.stages if stage.key not in finished]
    return lines + [f"  under way: {title} {told['share']:.0%} {told['text']}" for title, told in running if told]


def _finish(cell_counts: CellCounts, out: Path, left_out: str) -> int:
    from kdbench.board.report import leaderboards, write_all  # a second of imports that nobody waits for before the run

    write_all(out)
    print(leaderboards(out, "table"))
    if left_out:
        print(left_out)
    failed = {reason: count for (status, reason), count in cell_counts.items() if status is records.Status.FAILED}
    for reason, count in failed.items():
        print(f"{count} cells failed: {reason}")
    print(f"Results and leaderboards: {out}\nPlots: {out / 'plots'}")
    return SOME_FAILED if failed else DONE


def _options(name: str, changes: dict[str, Any], request: Request) -> Options:
    """A changed suite gets a folder of its own: its cells are not those of the suite."""
    suffix = "-" + hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:6] if changes else ""
    return Options(
        store=request.store,
        out=request.out or Path("runs") / f"{name}{suffix}",
        device=request.device,
        jobs=request.jobs or 0,
        threads=request.threads,
        compile=request.compile,
        fuse=request.fuse,
        data_folder=request.data_dir.absolute(),
        force=request.force,
        profile=request.profile,
    )


def _change(text: str) -> tuple[str, Any]:
    """PATH=VALUE, the value as TOML has it; what is not TOML is a string."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise KdbenchError(f"--set takes PATH=VALUE, such as attack.kd.temperature=20, not '{text}'.")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value
