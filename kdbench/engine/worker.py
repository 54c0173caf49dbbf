"""The worker: runs a stage, or several together, given the store and their keys.

What it leaves in the store is the truth; exit codes are hints.
"""

import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from kdbench.engine.digests import file_digest
from kdbench.engine.leases import Lease
from kdbench.engine.manifest import Failure, Manifest
from kdbench.engine.numerics import apply_numerics
from kdbench.engine.orders import Order
from kdbench.engine.stage_log import StageLog, Stopped
from kdbench.engine.stages import run_stage
from kdbench.engine.store import Store
from kdbench.engine.workspace import TENSORS, FusedStages, Workspace
from kdbench.errors import KdbenchError
from kdbench.game.fields import plain

PUBLISHED, FAILED, BUSY, STOPPED = 0, 1, 4, 75
HEARTBEAT_SECONDS = 20.0


def run_worker(root: str, *keys: str) -> int:
    """Run the stages `keys` of the store at `root`; one of the exit codes above."""
    store = Store(Path(root))
    mine: list[str] = []
    busy = False
    with ExitStack() as claims:
        for key in keys:
            lease = claims.enter_context(store.claim(key))
            if store.has(key):
                continue
            if lease:
                claims.enter_context(_heartbeat(lease))
                mine.append(key)
            busy |= lease is None
        codes = _attempts(store, mine) if mine else []
    return BUSY if busy else max(codes, default=PUBLISHED)


@contextmanager
def _heartbeat(lease: Lease) -> Iterator[None]:
    """Renew a lease inside, however long the stage reports nothing."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the file server may fail once; the next heartbeat is early enough
                lease.heartbeat()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _attempts(store: Store, keys: Sequence[str]) -> list[int]:
    """Try each stage, several of them together; their exit codes."""
    codes: list[int] = []
    stage_logs = [StageLog(store.scratch(key), store.checkpoint_folder(key)) for key in keys]
    signal.signal(signal.SIGTERM, lambda *_: _stop(stage_logs))
    if len(keys) == 1:
        return [_attempt(store, keys[0], stage_logs[0], None)]
    fused_stages = FusedStages()

    def attempt(key: str, stage_log: StageLog) -> Callable[[], None]:
        return lambda: codes.append(_attempt(store, key, stage_log, fused_stages))

    fused_stages.fused.run([attempt(key, stage_log) for key, stage_log in zip(keys, stage_logs, strict=True)])
    return codes


def _stop(stage_logs: Sequence[StageLog]) -> None:
    for stage_log in stage_logs:
        stage_log.stop = True


def _attempt(store: Store, key: str, stage_log: StageLog, fused_stages: FusedStages | None) -> int:
    out = stage_log.out
    try:
        store.publish(key, out, _run(store, key, stage_log, fused_stages))
    except Stopped:
        return STOPPED
    except Exception as error:  # the one place: a broken cell must not cost the rest
        if store.has(key):  # somebody else published meanwhile and removed the checkpoints: not a failure
            return PUBLISHED
        store.fail(key, _failure(error))
        return FAILED
    finally:
        shutil.rmtree(out, ignore_errors=True)
    store.delete_checkpoints(key)
    return PUBLISHED


def _run(store: Store, key: str, stage_log: StageLog, fused_stages: FusedStages | None) -> Manifest:
    """Run the stage; its manifest."""
    order = Order.from_json(store.spec(key))
    spec, options = order.spec, order.options
    stage_log.profiling = options.profile
    apply_numerics(spec.numerics)
    start = time.perf_counter()
    data_folder = Path(options.data_folder)
    workspace = Workspace(store, stage_log.out, stage_log, spec.numerics.device, data_folder, fused_stages)
    metrics = run_stage(spec, workspace)
    seconds = time.perf_counter() - start - (fused_stages.fused.waited() if fused_stages else 0.0)
    tensors = stage_log.out / TENSORS
    return Manifest(
        spec.kind,
        order.title,
        plain(spec),
        metrics,
        stage_log.numbers,
        tuple(stage_log.pictures),
        seconds,
        stage_log.throughput,
        machine(),
        file_digest(tensors) if tensors.exists() else "",
    )


def _failure(error: Exception) -> Failure:
    reason = str(error) if isinstance(error, KdbenchError) else f"{type(error).__name__}: {error}"
    return Failure(reason, "".join(traceback.format_exception(error)))


def machine() -> dict[str, str]:
    """Versions and hardware, for the record."""
    packages = {name: version(name) for name in ("kdbench", "torch", "torchvision", "torchattacks", "numpy")}
    return {**packages, "python": platform.python_version(), "cpu": _cpu(), "cores": str(os.cpu_count())}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(run_worker(*sys.argv[1:]))
