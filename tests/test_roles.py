"""Roles of randomness: no two of a cell share a stream, measured on the stages themselves."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from stage_runs import Rerun, with_attack
from torch import Tensor, nn

from kdbench import registry
from kdbench.api import Access, Attack, Context, Oracle
from kdbench.engine import models, stages, workspace
from kdbench.engine.models import Standardise
from kdbench.engine.numerics import Numerics
from kdbench.engine.plan import Plan
from kdbench.engine.planner import make_plan
from kdbench.evaluation import adversarial, transfer
from kdbench.game import roles
from kdbench.game.roles import Role, derive
from kdbench.suites.suite import Suite
from runs import FinishedRun, Json, RecordedProgress, run

SUITE: Json = {
    "defenses": ["none", "adaptive-misinformation"],  # the second hardens, has an auxiliary model, and acts on answers
    "attacks": ["kd"],
    "baselines": ["cross-entropy"],
    "scenario.data": 0.5,
    "robustness.level": "fast",
    "robustness.pgd_steps": 1,
    "victim.recipe.crop": 1,
    "student.recipe.crop": 1,
}
DRAWING = {
    *(Role.VICTIM_WEIGHTS, Role.VICTIM_TRAINING, Role.HARDENING, Role.AUXILIARY, Role.STUDENT_WEIGHTS, Role.ATTACK),
    *(Role.ATTACKED_SERVICE, Role.EVALUATED_SERVICE, Role.EVALUATION, Role.DATA_SUBSET),
}
Draws = dict[Role, set[tuple[float, ...]]]


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The tiny suite with crops, and a defense that draws wherever one can; nobody changes this folder."""
    folder, progress_display = tmp_path_factory.mktemp("roles"), RecordedProgress()
    found = FinishedRun(folder, run(tiny(SUITE), folder, progress_display), progress_display)
    assert progress_display.problems == {}
    return found


@pytest.fixture
def planned(tiny: Callable[..., Suite], finished: FinishedRun) -> Plan:
    [data] = [key for key in finished.store.finished() if key.startswith("data/")]
    return make_plan(tiny(SUITE), Numerics(), finished.store.manifest(data).content)


@pytest.fixture
def rerun(finished: FinishedRun, tmp_path: Path) -> Rerun:
    return Rerun(finished.store, tmp_path)


@dataclass
class Recorder:
    """Stands in for `derive` and keeps what it gave to whom."""

    seeds: dict[Role, set[int]] = field(default_factory=lambda: defaultdict(set))

    def __call__(self, seed: int, role: Role, *rest: object) -> int:
        derived = derive(seed, role, *rest)
        self.seeds[role].add(derived)
        return derived

    def first_draws(self) -> Draws:
        """What generators with these seeds draw first."""
        return {
            role: {tuple(torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in seeds}
            for role, seeds in self.seeds.items()
        }


@contextmanager
def deriving(act: Callable[..., int]) -> Iterator[None]:
    """Has all of kdbench derive its seeds by `act` inside."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (models, workspace, stages, adversarial, transfer):
            if "derive" in vars(module):
                patch.setattr(module, "derive", act)
        yield


def test_no_two_roles_of_a_cell_share_their_first_draw(planned: Plan, rerun: Rerun) -> None:
    """Each stage of a plan runs while its seeds are recorded; every generator in it has one of them."""
    draws: dict[str, Draws] = {}
    for key, stage in planned.stages.items():
        recorder, room = Recorder(), rerun.workspace()
        with deriving(recorder):
            stages.run_stage(stage.spec, room)
        derived = set().union(*recorder.seeds.values())
        assert {generator.initial_seed() for generator in room.stage_log.generators} <= derived, stage.title
        draws[key] = recorder.first_draws()
    everybody: set[Role] = set()
    for cell in planned.cells:
        of_cell: Draws = defaultdict(set)
        for key in cell.stages.values():
            for role, drawn in draws[key].items():
                of_cell[role] |= drawn
        for one, other in combinations(of_cell, 2):
            assert not of_cell[one] & of_cell[other], (cell.name, one, other)
        everybody |= of_cell.keys()
    assert everybody >= DRAWING


def test_every_call_names_its_role() -> None:
    """There is no default: a role that is forgotten is an error."""
    with pytest.raises(TypeError):
        derive(0)  # type: ignore[call-arg]
    assert len({derive(0, role) for role in Role}) == len(Role)
    assert derive(0, Role.ATTACK) != derive(1, Role.ATTACK) != derive(1, Role.ATTACK, "x")


def test_roles_that_make_networks_draw_their_weights_apart() -> None:
    making = [role for role in Role if role in roles._WEIGHTS]
    weights = [role.weights for role in making]
    assert len(set(weights)) == len(weights)
    assert not set(weights) & set(making)


def batches(rerun: Rerun, planned: Plan, title: str) -> list[bytes]:
    """The batches of images, augmented, on which the stage of that title trains its network, in their order."""
    seen: list[bytes] = []
    forward = Standardise.forward

    def recording(self: Standardise, x: Tensor) -> Tensor:
        if self.training and x.requires_grad is False and torch.is_grad_enabled():
            seen.append(x.contiguous().numpy().tobytes())
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Standardise, "forward", recording)
        [spec] = [stage.spec for stage in planned.stages.values() if stage.title == title]
        rerun.run(spec)
    return seen


VICTIM, STUDENT = "train the victim, seed 0", "kd from none, seed 0"


def test_a_student_is_not_trained_on_the_batches_of_the_victim(
    rerun: Rerun, tiny: Callable[..., Suite], finished: FinishedRun
) -> None:
    """With equal recipes on equal images, of equal numbers of batches none is common. With one stream, all would be."""
    [data] = [key for key in finished.store.finished() if key.startswith("data/")]
    whole = tiny({**SUITE, "scenario.data": 1.0})
    plan = make_plan(whole, Numerics(), finished.store.manifest(data).content)
    victim, student = (batches(rerun, plan, title) for title in (VICTIM, STUDENT))
    assert len(victim) == len(student) == 2 * 3
    assert not set(victim) & set(student)
    with deriving(lambda seed, role, *rest: derive(seed, Role.ATTACK, *rest)):
        assert batches(rerun, plan, VICTIM) == batches(rerun, plan, STUDENT)


@dataclass(frozen=True)
class Starting(Attack):
    """Keeps the weights that its student starts from."""

    needs: ClassVar[Access] = Access.NOTHING
    starts: ClassVar[list[Tensor]] = []

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        self.starts.append(torch.cat([weights.detach().flatten() for weights in student.parameters()]))
        return student


def test_students_of_one_seed_start_from_the_same_weights_whatever_the_defense(
    planned: Plan, rerun: Rerun, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: Starting if name == "starting" else load(kind, name))
    Starting.starts.clear()
    attack_runs = [stage.spec for stage in planned.stages.values() if stage.kind == "steal"]
    for spec in attack_runs:
        rerun.run(with_attack(spec, "starting"))
    assert len(Starting.starts) == len(attack_runs) >= 3
    assert all(torch.equal(Starting.starts[0], other) for other in Starting.starts)
