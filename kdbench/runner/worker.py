"""The worker: does one stage, given the store and the key. What it leaves in the store is the truth; exit codes are hints."""

import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kdbench.errors import KdbenchError
from kdbench.runner.journal import Journal, Stopped
from kdbench.runner.stages import TENSORS, Desk, run_stage
from kdbench.runner.store import Claim, Store, file_digest

PUBLISHED, FAILED, BUSY, STOPPED = 0, 1, 4, 75


def work(root: str, key: str) -> int:
    """Do the stage `key` of the store at `root`; one of the exit codes above."""
    store = Store(Path(root))
    with store.claim(key) as claim:
        if store.has(key):
            return PUBLISHED
        if claim is None:
            return BUSY
        return _attempt(store, key, claim)


def _attempt(store: Store, key: str, claim: Claim) -> int:
    out = store.scratch(key)
    journal = Journal(out, store.workplace(key), claim)
    signal.signal(signal.SIGTERM, lambda *_: setattr(journal, "stop", True))
    try:
        store.publish(key, out, _do(store, key, out, journal))
    except Stopped:
        return STOPPED
    except Exception as error:  # the one place: a broken cell must not cost the rest
        if store.has(key):  # somebody else published meanwhile and tidied up: not a failure
            return PUBLISHED
        store.fail(key, _report(error))
        return FAILED
    finally:
        shutil.rmtree(out, ignore_errors=True)
    store.forget_work(key)
    return PUBLISHED


def _do(store: Store, key: str, out: Path, journal: Journal) -> dict[str, Any]:
    """Run the stage; its manifest."""
    order = store.spec(key)
    numerics = order["spec"]["numerics"]
    _settle(numerics)
    start = time.perf_counter()
    desk = Desk(store, out, journal, numerics["device"], Path(order["data_folder"]))
    metrics = run_stage(order["kind"], order["spec"], desk)
    seconds = time.perf_counter() - start
    content = {"content": file_digest(out / TENSORS)} if order["kind"] == "data" else {}
    return {
        **order,
        **content,
        "metrics": metrics,
        "pictures": journal.pictures,
        "seconds": seconds,
        "machine": machine(),
    }


def _settle(numerics: Mapping[str, Any]) -> None:
    """Make the arithmetic of this process what the protocol says."""
    torch.set_num_threads(numerics["threads"])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


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
