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

from kdbench.errors import KdbenchError
from kdbench.game.fields import plain
from kdbench.runner.journal import Journal, Stopped
from kdbench.runner.stages import TENSORS, Crew, Desk, run_stage
from kdbench.runner.store import Claim, Store, file_digest

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

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file server that stumbles; the next beat will do
                claim.beat()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()


def _attempts(store: Store, keys: Sequence[str]) -> list[int]:
    """Try each stage, several of them side by side; their exit codes."""
    codes: list[int] = []
    journals = [Journal(store.scratch(key), store.workplace(key)) for key in keys]
    signal.signal(signal.SIGTERM, lambda *_: _stop(journals))
    if len(keys) == 1:
        return [_attempt(store, keys[0], journals[0], None)]
    crew = Crew()

    def seat(key: str, journal: Journal) -> Callable[[], None]:
        return lambda: codes.append(_attempt(store, key, journal, crew))

    crew.company.play([seat(key, journal) for key, journal in zip(keys, journals, strict=True)])
    return codes


def _stop(journals: Sequence[Journal]) -> None:
    for journal in journals:
        journal.stop = True


def _attempt(store: Store, key: str, journal: Journal, crew: Crew | None) -> int:
    out = journal.out
    try:
        store.publish(key, out, _do(store, key, journal, crew))
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


def _do(store: Store, key: str, journal: Journal, crew: Crew | None) -> dict[str, Any]:
    """Run the stage; its manifest."""
    order = store.spec(key)
    journal.profiling = order.get("profile", False)
    numerics = order["spec"]["numerics"]
    _settle(numerics)
    start = time.perf_counter()
    desk = Desk(store, journal.out, journal, numerics["device"], Path(order["data_folder"]), crew)
    metrics = run_stage(order["kind"], order["spec"], desk)
    seconds = time.perf_counter() - start - (crew.company.idle() if crew else 0.0)
    content = {"content": file_digest(journal.out / TENSORS)} if order["kind"] == "data" else {}
    return {
        **order,
        **content,
        "metrics": metrics,
        "pictures": journal.pictures,
        "seconds": seconds,
        "work": plain(journal.pace),
        "machine": machine(),
    }


def _settle(numerics: Mapping[str, Any]) -> None:
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
