"""The same key is the same bits: serial, parallel, interrupted anywhere and resumed, by one scheduler or by two."""

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kdbench.engine.digests import file_digest
from kdbench.engine.manifest import Manifest
from kdbench.engine.models import WEIGHTS
from kdbench.engine.numerics import Numerics
from kdbench.engine.plan import Stage
from kdbench.engine.planner import data_stage, make_plan
from kdbench.engine.scheduler import LOST_ATTEMPTS
from kdbench.engine.stage_log import StageLog, Stopped
from kdbench.engine.stages import run_stage
from kdbench.engine.store import MANIFEST, Store
from kdbench.engine.workspace import TENSORS, Workspace
from kdbench.records import Cell, Status, read
from kdbench.suites.methods import with_undefended
from kdbench.suites.reader import load

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
STRIKES = 20
DEADLY = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds its processes by /proc")


# In this process: every method, stopped at every checkpoint

METHODS = """
seeds = 1
defenses = ["none", "nasty", "guarded", "stingy", "adversarial-sparse", "assistant-distillation"]
attacks = ["kd", "once", "partial-kd", "assistant-kd", "deep-inversion", "adaptive-inversion"]
baselines = ["cross-entropy", "label-smoothing", "hard-label"]
dataset = "blobs"

[scenario]
access = "weights"

[victim]
network = "mini-8"
recipe = { epochs = 3, batch = 32, lr = 0.05, crop = 1, flip = true }

[student]
network = "mini-8"
recipe = { epochs = 3, batch = 32, optimizer = "adam", lr = 0.003, schedule = "cosine", crop = 1 }

[robustness]
level = "none"

[defense.guarded]
method = "nasty"
omega = 1e30

[defense.adversarial-sparse]
iterations = 2
pairing = "random"

[attack.once]
method = "kd"
queries = "once"

[attack.assistant-kd]
chain = ["mini-16", ""]

[attack.deep-inversion]
images = 48
batch = 16
iterations = 4

[attack.adaptive-inversion]
method = "deep-inversion"
images = 48
batch = 16
iterations = 4
competition = 1.0
steps = 2
"""

ALIKE = ("nasty", "guarded", "adversarial-sparse", "assistant-distillation")  # to an attacker they are another network


@dataclass
class Bench:
    """Runs stages in this process, one after another, into a store."""

    store: Store
    folder: Path

    def publish(self, stage: Stage) -> Manifest:
        """Run a stage undisturbed and publish it; its manifest."""
        out = self.store.scratch(stage.key)
        metrics = run_stage(stage.spec, Workspace(self.store, out, self.log(out), "cpu", self.folder))
        content = file_digest(out / TENSORS) if stage.kind == "data" else ""
        self.store.publish(stage.key, out, Manifest(stage.kind, metrics=metrics, content=content))
        return self.store.manifest(stage.key)

    def piecemeal(self, stage: Stage) -> tuple[dict[str, float], dict[str, str], int]:
        """Run a stage that is asked to stop all the time, as often as it takes: numbers, digests of files, attempts."""
        work = self.store.checkpoint_folder(f"work/{secrets.token_hex(4)}")
        for attempt in range(1, 1000):
            out = self.store.scratch(stage.key)
            log = StageLog(out, work)
            log.stop = True
            try:
                metrics = run_stage(stage.spec, Workspace(self.store, out, log, "cpu", self.folder))
            except Stopped:
                continue
            return metrics, {path.name: file_digest(path) for path in out.iterdir()}, attempt
        raise AssertionError(f"{stage.title} makes no progress")

    def log(self, out: Path) -> StageLog:
        return StageLog(out, self.store.checkpoint_folder(f"work/{secrets.token_hex(4)}"))


def test_every_method_stopped_at_every_checkpoint_leaves_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "methods.toml").write_text(METHODS)
    suite = with_undefended(load(str(tmp_path / "methods.toml")))
    bench = Bench(Store(tmp_path / "store"), tmp_path)
    content = bench.publish(data_stage(suite.dataset)).content
    stages_run = 0
    for stage in make_plan(suite, Numerics(), content).stages.values():
        if stage.kind in ("data", "evaluate") or any(f" from {who}," in stage.title for who in ALIKE):
            continue
        whole = bench.publish(stage)
        metrics, files, attempts = bench.piecemeal(stage)
        assert metrics == whole.metrics, stage.title
        assert files == whole.files, stage.title
        assert attempts > 3, stage.title  # three epochs, a checkpoint each
        stages_run += 1
    assert stages_run == 1 + 4 + 7 * 2 + 2 * 2


# Runs of the command line


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
        return sorted({path.parent.name for path in work.glob("*/part-*.safetensors")} - published)

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


@pytest.fixture(scope="module")
def schedulers() -> Iterator[list[SchedulerProcess]]:
    """Scheduler processes to be killed at the end, however the tests end."""
    kept: list[SchedulerProcess] = []
    yield kept
    for scheduler in kept:
        for pid in scheduler.alive():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(schedulers: list[SchedulerProcess], tmp_path_factory: pytest.TempPathFactory) -> tuple[Traces, Traces]:
    """The same suite by one worker and by two, each in a store of its own, at the same time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pair = [SchedulerProcess(folder / f"jobs{jobs}", jobs, checkpoint_seconds=30).start() for jobs in (1, 2)]
    schedulers += pair
    for scheduler in pair:
        scheduler.ended(0)
        assert_tidy(scheduler.store)
    serial, parallel = (Traces.of(scheduler) for scheduler in pair)
    return serial, parallel


@linux
def test_a_suite_gives_the_same_in_series_and_in_parallel(undisturbed: tuple[Traces, Traces]) -> None:
    serial, parallel = undisturbed
    assert_same(serial, parallel)
    assert len(serial.weights) == 1 + 1 + 3 + 1
    assert len(serial.cells) == 3 + 1
    assert {cell.status for cell in serial.cells} == {Status.DONE}


@linux
def test_a_run_that_is_interrupted_again_and_again_ends_as_if_nothing_had_been(
    undisturbed: tuple[Traces, Traces], schedulers: list[SchedulerProcess], tmp_path: Path
) -> None:
    """Two workers die, then the scheduler in the midst of a stage; the next one gets Ctrl-C; the third is left alone."""
    scheduler = SchedulerProcess(tmp_path)
    schedulers.append(scheduler)

    scheduler.start()
    scheduler.strike(signal.SIGKILL)
    scheduler.strike(signal.SIGTERM)
    scheduler.end_in_the_midst(signal.SIGKILL, stages=1)
    finished = scheduler.tokens()

    scheduler.start()
    until(lambda: scheduler.over() or (len(scheduler.tokens()) > 2 and bool(scheduler.workers())))
    scheduler.ctrl_c(group=True)
    finished |= scheduler.tokens()
    assert 2 < len(finished) < 14

    scheduler.start().ended(0)
    assert_same(Traces.of(scheduler), undisturbed[0])
    assert_tidy(scheduler.store)
    assert scheduler.tokens().items() >= finished.items()  # nothing was done twice


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_workers_die_with_their_scheduler(
    schedulers: list[SchedulerProcess], tmp_path: Path, number: signal.Signals
) -> None:
    """At once: left alone, these would train for hours."""
    scheduler = SchedulerProcess(tmp_path, suite=HOURS)
    schedulers.append(scheduler)
    scheduler.start()
    until(lambda: scheduler.over() or len(scheduler.under_way()) == 2)
    assert len(scheduler.workers()) == 2
    os.kill(scheduler.pid, number)
    until(lambda: scheduler.over() and not scheduler.alive(), 10)
    assert len(scheduler.under_way()) == 2


@linux
@pytest.mark.parametrize("group", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_lets_workers_stop_at_a_checkpoint(
    schedulers: list[SchedulerProcess], tmp_path: Path, group: bool
) -> None:
    """Whether all processes of the run get it, as from a terminal, or the scheduler alone."""
    scheduler = SchedulerProcess(
        tmp_path, checkpoint_seconds=3600, suite=HOURS
    )  # it is the stop that makes the checkpoint
    schedulers.append(scheduler)
    scheduler.start()
    progress = scheduler.folder / "store" / "work"
    until(lambda: scheduler.over() or len(list(progress.glob("*/progress.json"))) == 2)
    assert scheduler.under_way() == []
    scheduler.ctrl_c(group=group)
    assert len(scheduler.under_way()) == 2
    for name in ("claims", "tmp"):
        assert os.listdir(scheduler.store.root / name) == [], name


@linux
@pytest.mark.slow
def test_two_schedulers_on_one_store_share_the_stages_and_their_results(
    undisturbed: tuple[Traces, Traces], schedulers: list[SchedulerProcess], tmp_path: Path
) -> None:
    pair = [SchedulerProcess(tmp_path, jobs=1, out=out).start() for out in ("one", "two")]
    schedulers += pair
    for scheduler in pair:
        scheduler.ended(0)
    for scheduler in pair:
        assert_same(Traces.of(scheduler), undisturbed[0])
    assert_tidy(scheduler.store)


@linux
@pytest.mark.slow
def test_chaos_changes_nothing(schedulers: list[SchedulerProcess], tmp_path: Path) -> None:
    """Random processes of a run are killed at random moments; the scheduler is started again; then it is left alone."""
    suite = (
        SUITE.replace("seeds = 1", "seeds = 2")
        .replace("epochs = 12", "epochs = 60")
        .replace("epochs = 5", "epochs = 30")
    )
    quiet = SchedulerProcess(tmp_path / "quiet", checkpoint_seconds=30, suite=suite)
    schedulers.append(quiet)
    quiet.start().ended(0)
    seed = int(os.environ.get("KDBENCH_CHAOS_SEED") or secrets.randbelow(10**6))
    print(f"KDBENCH_CHAOS_SEED={seed}")
    chance = random.Random(seed)
    scheduler = SchedulerProcess(tmp_path / "chaos", suite=suite)
    schedulers.append(scheduler)
    finished: dict[str, str] = {}
    struck = 0
    scheduler.start()
    while struck < STRIKES:
        time.sleep(chance.uniform(0.1, 0.9))
        if scheduler.over():
            if scheduler.outcome() == 0:
                break
            scheduler.start()
        if victims := chance.choices((scheduler.workers(), scheduler.children(), [scheduler.pid]), (70, 15, 15))[0]:
            struck += send(chance.choice(sorted(victims)), chance.choice(DEADLY))
        assert scheduler.tokens().items() >= finished.items()
        finished = scheduler.tokens()
    while scheduler.outcome() != 0:
        scheduler.start()
    print(f"{struck} processes were killed")
    assert struck
    assert_same(Traces.of(scheduler), Traces.of(quiet))
    assert scheduler.tokens().items() >= finished.items()
    for name in ("claims", "failures"):
        assert os.listdir(scheduler.store.root / name) == [], name
