"""The worker: does a stage, or several side by side, given the store and their keys.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kdbench.engine.stage_log import StageLog, Stopped
from kdbench.engine.stages import TENSORS, FusedStages, Workspace, run_stage
from kdbench.engine.store import Claim, Store, file_digest
from kdbench.errors import KdbenchError
from kdbench.game.fields import plain

PUBLISHED, FAILED, BUSY, STOPPED = 0, 1, 4, 75
BEAT_SECONDS = 20.0


def work(root: str, *keys: str) -> int:
    """Do the stages `keys` of the store at `root`; one of the exit codes above."""
    store = Store(Path(root))
    mine: list[str] = []
    busy = False
    with ExitStack() as claims:
        for key in keys:
            claim = claims.enter_context(store.claim(key))
            if store.has(key):
                continue
            if claim:
                claims.enter_context(_alive(claim))
                mine.append(key)
            busy |= claim is None
        codes = _attempts(store, mine) if mine else []
    return BUSY if busy else max(codes, default=PUBLISHED)


@contextmanager
def _alive(claim: Claim) -> Iterator[None]:
    """Keep a claim alive inside, however long the stage is silent."""
    over = threading.Event()

    def heartbeat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file server that stumbles; the next beat will do
                claim.heartbeat()

    heart = threading.Thread(target=heartbeat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()


def _attempts(store: Store, keys: Sequence[str]) -> list[int]:
    """Try each stage, several of them side by side; their exit codes."""
    codes: list[int] = []
    stage_logs = [StageLog(store.scratch(key), store.checkpoint_folder(key)) for key in keys]
    signal.signal(signal.SIGTERM, lambda *_: _stop(stage_logs))
    if len(keys) == 1:
        return [_attempt(store, keys[0], stage_logs[0], None)]
    fused_stages = FusedStages()

    def seat(key: str, stage_log: StageLog) -> Callable[[], None]:
        return lambda: codes.append(_attempt(store, key, stage_log, fused_stages))

    fused_stages.fused.run([seat(key, stage_log) for key, stage_log in zip(keys, stage_logs, strict=True)])
    return codes


def _stop(stage_logs: Sequence[StageLog]) -> None:
    for stage_log in stage_logs:
        stage_log.stop = True


def _attempt(store: Store, key: str, stage_log: StageLog, fused_stages: FusedStages | None) -> int:
    out = stage_log.out
    try:
        store.publish(key, out, _do(store, key, stage_log, fused_stages))
    except Stopped:
        return STOPPED
    except Exception as error:  # the one place: a broken cell must not cost the rest
        if store.has(key):  # somebody else published meanwhile and tidied up: not a failure
            return PUBLISHED
        store.fail(key, _report(error))
        return FAILED
    finally:
        shutil.rmtree(out, ignore_errors=True)
    store.delete_checkpoints(key)
    return PUBLISHED


def _do(store: Store, key: str, stage_log: StageLog, fused_stages: FusedStages | None) -> dict[str, Any]:
    """Run the stage; its manifest."""
    order = store.spec(key)
    stage_log.profiling = order.get("profile", False)
    numerics = order["spec"]["numerics"]
    apply_numerics(numerics)
    start = time.perf_counter()
    workspace = Workspace(store, stage_log.out, stage_log, numerics["device"], Path(order["data_folder"]), fused_stages)
    metrics = run_stage(order["kind"], order["spec"], workspace)
    seconds = time.perf_counter() - start - (fused_stages.fused.waited() if fused_stages else 0.0)
    content = {"content": file_digest(stage_log.out / TENSORS)} if order["kind"] == "data" else {}
    return {
        **order,
        **content,
        "metrics": metrics,
        "pictures": stage_log.pictures,
        "seconds": seconds,
        "work": plain(stage_log.throughput),
        "machine": machine(),
    }


def apply_numerics(numerics: Mapping[str, Any]) -> None:
    """Make the arithmetic of this process what the protocol says."""
    torch.set_num_threads(numerics["threads"])
    # An accelerator lacks a deterministic form of some operations: there it is a wish, on a CPU it is the law.
    torch.use_deterministic_algorithms(True, warn_only=numerics["device"] != "cpu")
    # Nothing here reads what it has not written. (The name is made by a class behind the module, which mypy cannot see.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # Off unless bf16 is on: cuDNN's convolutions would round fp32 to ten bits, too coarse for finite differences.
    torch.backends.cudnn.allow_tf32 = numerics["precision"] != "fp32"


def _report(error: Exception) -> dict[str, str]:
    reason = str(error) if isinstance(error, KdbenchError) else f"{type(error).__name__}: {error}"
    return {"reason": reason, "traceback": "".join(traceback.format_exception(error))}


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
    sys.exit(work(*sys.argv[1:]))
