"""`kdbench run` as a process that tests can watch and interrupt, and all that must not depend on how a run went."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kdbench.engine.digests import file_digest
from kdbench.engine.models import WEIGHTS
from kdbench.engine.scheduler import LOST_ATTEMPTS
from kdbench.engine.store import MANIFEST, Store
from kdbench.records import Cell, read

SUITE = """
seeds = 1
defenses = ["none", "nasty", "stingy"]
attacks = ["kd"]
baselines = ["cross-entropy"]
dataset = "blobs"

[victim]
network = "mini-8"
recipe = { epochs = 12, batch = 16, lr = 0.05, crop = 1, flip = true }

[student]
network = "mini-8"
recipe = { epochs = 5, batch = 16, optimizer = "adam", lr = 0.003, schedule = "cosine", crop = 1 }

[robustness]
level = "fast"
pgd_steps = 2
"""


LEADERBOARDS = ("leaderboard.md", "leaderboard.csv", "leaderboard.json")


HOURS = SUITE.replace("epochs = ", "epochs = 100000")


DEADLY = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds its processes by /proc")


def _as_from_a_terminal() -> None:
    """Whoever starts these tests in the background hands down a Ctrl-C that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class SchedulerProcess:
    """`kdbench run` as a process of its own. It leads a session, by which all processes of the run are found."""

    folder: Path
    jobs: int = 2
    out: str = "out"
    checkpoint_seconds: int = 0
    suite: str = SUITE
    process: "subprocess.Popen[str] | None" = None

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @property
    def results(self) -> Path:
        return self.folder / self.out

    @property
    def arguments(self) -> list[str]:
        folders = ["--store", "store", "--out", self.out]
        return ["run", "small.toml", *folders, "-q", "-j", str(self.jobs), "--device", "cpu"]

    @property
    def line(self) -> str:
        return " ".join(["kdbench", *self.arguments])

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def start(self) -> "SchedulerProcess":
        self.folder.mkdir(exist_ok=True)
        (self.folder / "small.toml").write_text(self.suite)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdbench", *self.arguments],
            cwd=self.folder,
            env=os.environ | {"KDBENCH_CHECKPOINT_SECONDS": str(self.checkpoint_seconds)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_as_from_a_terminal,  # noqa: PLW1509 - it takes no lock
        )
        return self

    def ended(self, code: int) -> str:
        """Wait until the scheduler ends with `code` and nothing of it is left; what it wrote to standard error."""
        assert self.process
        _, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == code, errors
        until(lambda: not self.alive(), 10)
        return errors

    def alive(self) -> dict[int, int]:
        """All living processes of this run and their parents."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent, _, session, *_ = path.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):  # gone meanwhile
                continue
            if int(session) == self.pid and state != "Z":
                found[int(path.parent.name)] = int(parent)
        return found

    def children(self) -> list[int]:
        """The scheduler's children: the forkserver and Python's resource tracker."""
        return [pid for pid, parent in self.alive().items() if parent == self.pid]

    def workers(self) -> list[int]:
        """Those that run a stage: the scheduler's grandchildren."""
        alive = self.alive()
        return [pid for pid, parent in alive.items() if alive.get(parent) == self.pid]

    def strike(self, number: signal.Signals) -> None:
        """Send a signal to a worker, as soon as there is one."""
        until(lambda: any(send(pid, number) for pid in self.workers()))

    def under_way(self) -> list[str]:
        """Unfinished stages that have a checkpoint."""
        published = {key.replace("/", "-") for key in self.store.finished()}
        work = self.store.root / "work"
        return sorted({path.parent.name for path in work.glob("*/[!.]*.safetensors")} - published)

    def ctrl_c(self, *, group: bool) -> None:
        """Interrupt the run as a terminal does, or the scheduler alone; it must say how to go on and leave nothing alive."""
        (os.killpg if group else os.kill)(self.pid, signal.SIGINT)
        said = self.ended(130)
        assert said.splitlines() == ["", f"Interrupted. What was finished is kept; to go on: {self.line}"]
        assert os.listdir(self.store.root / "failures") == []

    def end_in_the_midst(self, number: signal.Signals, stages: int) -> None:
        """End the scheduler by a signal when so many stages are finished and another one is at work and has a checkpoint."""
        midst = False
        while not midst:
            until(lambda: self.over() or (len(self.store.finished()) >= stages and bool(self.workers())))
            assert not self.over(), self.ended(0)
            frozen = [self.pid]  # the scheduler first, so that no worker is started while we look
            os.kill(self.pid, signal.SIGSTOP)
            frozen += [pid for pid in self.workers() if send(pid, signal.SIGSTOP)]
            midst = len(frozen) > 1 and bool(self.under_way())
            if midst:
                os.kill(self.pid, number)
            for pid in frozen:
                send(pid, signal.SIGCONT)
        self.ended(-number)

    def outcome(self) -> int:
        """The exit code of the scheduler: all is done, a stage died too often, or it was killed; and nothing of it is left."""
        assert self.process
        printed, errors = self.process.communicate(timeout=300)
        until(lambda: not self.alive(), 10)
        code = self.process.returncode
        assert (
            code in (0, 128 + signal.SIGTERM, *(-number for number in DEADLY))
            or f"{LOST_ATTEMPTS} times; its log is" in printed + errors
        ), errors
        return code

    def over(self) -> bool:
        assert self.process
        return self.process.poll() is not None

    def tokens(self) -> dict[str, str]:
        """Who has published what."""
        return {key: self.store.manifest(key).token for key in self.store.finished()}


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal to a process; False when it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def until(claim: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until `claim` holds."""
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@dataclass(frozen=True)
class Traces:
    """All that must not depend on how a run went."""

    weights: dict[str, bytes]
    metrics: dict[str, dict[str, float]]
    files: dict[str, dict[str, str]]
    cells: list[Cell]
    predictions: bytes
    leaderboards: dict[str, bytes]

    @classmethod
    def of(cls, scheduler: SchedulerProcess) -> "Traces":
        store, out = scheduler.store, scheduler.results
        keys = sorted(store.finished())
        files = {key: {p.name: file_digest(p) for p in store.path(key).iterdir() if p.name != MANIFEST} for key in keys}
        assert {key: store.manifest(key).files for key in keys} == files
        return cls(
            weights={key: (store.path(key) / WEIGHTS).read_bytes() for key in keys if WEIGHTS in files[key]},
            metrics={key: store.manifest(key).metrics for key in keys},
            files=files,
            cells=[timeless(cell) for cell in read(out)],
            predictions=(out / "predictions.safetensors").read_bytes(),
            leaderboards={name: (out / name).read_bytes() for name in LEADERBOARDS},
        )


def timeless(cell: Cell) -> Cell:
    return replace(cell, seconds={}, machine={})


def assert_same(one: Traces, other: Traces) -> None:
    """Field by field, so that a difference is named."""
    assert one.files.keys() == other.files.keys()
    assert [key for key in one.weights if one.weights[key] != other.weights[key]] == []
    assert one.files == other.files
    assert one.metrics == other.metrics
    assert one.cells == other.cells
    assert one.predictions == other.predictions
    assert [name for name in LEADERBOARDS if one.leaderboards[name] != other.leaderboards[name]] == []


def assert_tidy(store: Store) -> None:
    """Nobody is at work and nothing has failed."""
    for name in ("claims", "work", "failures"):
        assert os.listdir(store.root / name) == [], name
