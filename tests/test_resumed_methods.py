"""Every method, stopped at every checkpoint and resumed in this process, leaves the same bits."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from kdbench.engine.digests import file_digest
from kdbench.engine.manifest import Manifest
from kdbench.engine.numerics import Numerics
from kdbench.engine.plan import Stage
from kdbench.engine.planner import data_stage, make_plan
from kdbench.engine.stage_log import StageLog, Stopped
from kdbench.engine.stages import run_stage
from kdbench.engine.store import Store
from kdbench.engine.workspace import TENSORS, Workspace
from kdbench.suites.methods import with_undefended
from kdbench.suites.reader import load

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
