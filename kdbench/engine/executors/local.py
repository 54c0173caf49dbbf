"""The local executor: a fresh process a stage, forked from a server that has torch preloaded and has started no thread."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from kdbench.engine.executors.protocol import Handle, Report, State
from kdbench.engine.numerics import numerics_environment

GRACE_SECONDS = 5  # between asking a worker to stop and making it
PR_SET_PDEATHSIG = 1


class LocalExecutor:
    """Runs up to `jobs` workers at once on this machine; they end with the process that started them."""

    name = "local"

    def __init__(self, root: Path, jobs: int) -> None:
        self._root, self._jobs = root, jobs
        self._running: dict[Handle, ForkServerProcess] = {}
        self._not_started: dict[Handle, str] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["kdbench.engine.executors.preload"])

    def slots(self) -> int:
        """How many more workers may be started now."""
        return self._jobs - len(self._running)

    def submit(self, jobs: Sequence[tuple[str, ...]]) -> list[Handle]:
        """Start a worker for each job."""
        with numerics_environment():  # the server takes it over when it starts
            forkserver.ensure_running()
        return [self._start(keys) for keys in jobs]

    def poll(self, handles: Collection[Handle]) -> dict[Handle, Report]:
        """The state of each handle; a worker that has ended is GONE, with its exit code as a hint."""
        return {handle: self._report(handle) for handle in handles}

    def wait(self, seconds: float) -> None:
        """Sleep until a worker ends, at most so long."""
        connection.wait([process.sentinel for process in self._running.values()], seconds)

    def close(self) -> None:
        """End all workers: ask them to stop at a checkpoint, then kill them."""
        for process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self._running.clear()

    def _start(self, keys: tuple[str, ...]) -> Handle:
        process = self._context.Process(target=_child, args=(str(self._root), *keys), daemon=True)
        try:
            process.start()
        except (EOFError, OSError) as error:  # the forkserver died just now; the next submit starts another
            handle = Handle(self.name, "", keys)
            self._not_started[handle] = f"the worker could not be started ({type(error).__name__}: {error})"
            return handle
        handle = Handle(self.name, str(process.pid), keys)
        self._running[handle] = process
        return handle

    def _report(self, handle: Handle) -> Report:
        process = self._running.get(handle)
        if process is None:
            return Report(State.GONE, self._not_started.pop(handle, ""))
        if process.is_alive():
            return Report(State.RUNNING)
        process.join()
        del self._running[handle]
        return Report(State.GONE, _ending(process.exitcode), process.exitcode)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the worker was killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"the worker ended with exit code {code}"


def _child(root: str, *keys: str) -> None:
    """In the worker: end with the forkserver and with the scheduler, write to the first stage's log, run the stages."""
    threading.Thread(target=_end_with_scheduler, daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # the forkserver died before we could tie ourselves to it
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the scheduler's to handle
    from kdbench.engine.store import Store
    from kdbench.engine.worker import run_worker

    log = os.open(Store(Path(root)).log_path(keys[0]), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.exit(run_worker(root, *keys))


def _end_with_scheduler() -> None:
    """Wait for the end of the scheduler's process, however it ends, and end this one.

    The forkserver does not end with it: it lives as long as one of its children.
    """
    scheduler = multiprocessing.parent_process()
    assert scheduler
    connection.wait([scheduler.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
