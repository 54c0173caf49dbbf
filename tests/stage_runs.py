"""What tests share that run single stages in this process: a workspace, and specifications with another method in them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdbench.engine.parts import MethodSpec
from kdbench.engine.specs import EvaluateSpec, HardenSpec, StageSpec, StealSpec
from kdbench.engine.stage_log import StageLog
from kdbench.engine.stages import run_stage
from kdbench.engine.store import Store
from kdbench.engine.workspace import FusedStages, Workspace


@dataclass
class Rerun:
    """Runs stages of a finished run again, in this process; the store is only read."""

    store: Store
    folder: Path
    attempts: int = 0

    def run(self, spec: StageSpec) -> tuple[dict[str, float], Path]:
        """The metrics of a stage of this specification, and the folder it filled."""
        workspace = self.workspace()
        return run_stage(spec, workspace), workspace.out

    def workspace(self, fused_stages: FusedStages | None = None) -> Workspace:
        """A fresh one."""
        self.attempts += 1
        out, checkpoints = (self.folder / f"{name}{self.attempts}" for name in ("out", "checkpoints"))
        out.mkdir()
        checkpoints.mkdir()
        return Workspace(self.store, out, StageLog(out, checkpoints), "cpu", self.folder, fused_stages)


def method(name: str) -> MethodSpec:
    """A method that is registered under that name, with its default fields."""
    return MethodSpec(name, {}, "")


def with_attack(spec: StageSpec, name: str, **scenario: Any) -> StealSpec:
    """The specification of an attack run with another attack, in a changed scenario."""
    assert isinstance(spec, StealSpec)
    changed = replace(spec.attack.scenario, **scenario)
    return replace(spec, attack=replace(spec.attack, attack=method(name), scenario=changed))


def behind(spec: StageSpec, name: str, **victim: Any) -> StageSpec:
    """The specification of an attack run or an evaluation with another defense that serves, and a changed victim."""
    assert isinstance(spec, StealSpec | EvaluateSpec)
    assert spec.victim
    return replace(spec, victim=replace(spec.victim, defense=method(name), **victim))


def hardened_by(spec: StageSpec, name: str) -> StageSpec:
    """The specification of a hardening, or of an auxiliary model, with another defense."""
    assert isinstance(spec, HardenSpec)
    return replace(spec, defense=method(name))
