"""A session: a suite becomes a plan, the plan becomes finished stages, these become records."""

from pathlib import Path

from kdbench import records, registry
from kdbench.engine.executors.protocol import Executor, MakeExecutor
from kdbench.engine.numerics import Numerics
from kdbench.engine.orders import WorkerOptions
from kdbench.engine.plan import Plan
from kdbench.engine.planner import data_stage, make_plan
from kdbench.engine.scheduler import Outcome, ProgressDisplay, data_digest, discard_stages, run_stages
from kdbench.engine.store import Store, collect_garbage
from kdbench.engine.tensors import shape_of
from kdbench.engine.workspace import TENSORS
from kdbench.errors import KdbenchError
from kdbench.runs import plan_file
from kdbench.runs.machine import choose_device, choose_precision, cores
from kdbench.runs.recorder import CellCounts, Recorder
from kdbench.runs.request import Options
from kdbench.suites.preflight import try_networks
from kdbench.suites.suite import Choice, Suite


class Session:
    """Plans a suite, runs its stages, and writes its records."""

    def __init__(self, suite: Suite, options: Options, progress_display: ProgressDisplay) -> None:
        data_folder = options.data_dir.absolute()
        self.suite, self.options, self.progress_display = suite.stamped(data_folder), options, progress_display
        self.store, self.out = Store(options.store), options.out or Path("runs") / suite.name
        self.jobs = options.jobs or cores()
        self._worker_options = WorkerOptions(str(data_folder), options.profile)
        device = choose_device(options.device)
        precision = choose_precision(suite.precision, device)
        self.numerics = Numerics(device, precision, options.threads, options.compile, options.fuse)

    def plan(self) -> Plan:
        """The plan; reads the data sets first if the store does not have them.

        Raises `KdbenchError` for a data set that cannot be read, and for a network that cannot take its images.
        """
        content = self._content(self.suite.dataset)
        self._try_networks()
        surrogates = {choice.name: self._content(choice) for choice in self.suite.surrogates}
        return make_plan(self.suite, self.numerics, content, surrogates)

    def run_stages(self, plan: Plan) -> Outcome:
        """Do the stages of the plan that are not in the store; what became of them."""
        _refuse_another_matrix(plan, self.out)
        _announce_plan(plan, self.store, self.out)
        if self.options.force:
            discard_stages(plan, self.store)
        outcome = run_stages(
            plan.stages, self.store, self._executor(), self.progress_display, self._worker_options, self.options.fuse
        )
        collect_garbage(self.store)
        return outcome

    def record(self, plan: Plan, outcome: Outcome) -> CellCounts:
        """Write the records, the pictures of the first seed and the predictions; how many cells ended how, and why."""
        return Recorder(plan, self.store, outcome, self.out).record()

    def run(self) -> CellCounts:
        """All of it, one after the other."""
        plan = self.plan()
        return self.record(plan, self.run_stages(plan))

    def _content(self, dataset: Choice) -> str:
        return data_digest(
            data_stage(dataset), self.store, self._executor(), self.progress_display, self._worker_options
        )

    def _try_networks(self) -> None:
        key = data_stage(self.suite.dataset).key
        _, channels, height, width = shape_of(self.store.path(key) / TENSORS, "train.x")
        try_networks(self.suite, (channels, height, width), int(self.store.manifest(key).numbers["classes"]))

    def _executor(self) -> Executor:
        make: MakeExecutor = registry.load("executor", self.options.executor)
        return make(self.store.root, self.jobs)


def _refuse_another_matrix(plan: Plan, out: Path) -> None:
    """A results folder holds one matrix: with another's cells, its leaderboard would compare what no suite asked for."""
    others = set(records.names(out))
    if others:
        others.difference_update(cell.name for cell in plan.cells)
    if others:
        raise KdbenchError(
            f"{out} holds {len(others)} cells of another matrix ({min(others)}, ...). "
            "Choose another folder with --out, or remove it."
        )


def _announce_plan(plan: Plan, store: Store, out: Path) -> None:
    """Make the results folder, and say in it what it is to hold. Raises `KdbenchError` where that cannot be."""
    stages = ((stage.key, stage.title) for stage in plan.stages.values())
    try:
        out.mkdir(parents=True, exist_ok=True)
        plan_file.write(plan_file.relative(store.root, out), stages, (cell.name for cell in plan.cells), out)
    except OSError as error:
        raise KdbenchError(
            f"The results folder {out} cannot be used: {error.strerror}. Choose another with --out."
        ) from None
