"""What `kdbench status` says of a results folder."""

from collections import Counter
from pathlib import Path

from kdbench import records
from kdbench.engine.store import Store
from kdbench.runs import plan_file
from kdbench.runs.progress import duration


def status(folder: Path) -> str:
    """How far the run that writes to `folder` is, what failed and why, and how long its stages took.

    Raises `KdbenchError` when no run writes there, or its plan or records are damaged.
    """
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
    seconds = sum(store.manifest(key).seconds for key in done)
    lines = [f"stages: {len(done)} of {len(plan.stages)} done, {duration(seconds)} of computing"]
    running = [(stage.title, store.progress(stage.key)) for stage in plan.stages if stage.key not in finished]
    return lines + [f"  running: {title} {told.share:.0%} {told.text}" for title, told in running if told]
