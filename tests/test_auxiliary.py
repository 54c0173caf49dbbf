"""The auxiliary model that answering needs: made once for a victim, kept, and handed to every service."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from stage_runs import Rerun, behind, hardened_by
from torch import Tensor, nn

from helpers import blobs
from kdbench import registry
from kdbench.api import Context, Defense, KdbenchError, Service
from kdbench.board.report import write_report
from kdbench.engine.digests import file_digest
from kdbench.engine.models import WEIGHTS
from kdbench.engine.plan import STAGES_OF_CELL, Plan, PlannedCell, Stage
from kdbench.engine.specs import AuxiliarySpec, EvaluateSpec, StealSpec
from kdbench.engine.tensors import load_tensors
from kdbench.engine.victims import open_service
from kdbench.engine.workspace import FusedStages
from kdbench.game.roles import Role
from kdbench.records import Status
from kdbench.suites.suite import Suite
from runs import FinishedRun, Json, RecordedProgress, cell, numbers, run

REDIRECTION, MISINFORMATION = "gradient-redirection", "adaptive-misinformation"
WITH_AUXILIARY: Json = {
    "precision": "fp32",
    "defenses": ["none", "stingy", REDIRECTION, MISINFORMATION],
    "attacks": ["kd", "partial-kd"],
    "baselines": ["hard-label"],
    f"defense.{REDIRECTION}.epochs": 1,
}
DIVERGES: Json = {f"defense.{REDIRECTION}.recipe.lr": 1e30}


# What is planned


def served(plan: Plan, defense: str) -> list[PlannedCell]:
    """The cells of a defense."""
    return [c for c in plan.cells if c.defense and c.defense.name == defense]


def auxiliary_of(stage: Stage) -> str:
    """The stage that has the auxiliary model of the victim in an attack run or an evaluation."""
    assert isinstance(stage.spec, StealSpec | EvaluateSpec)
    assert stage.spec.victim
    return stage.spec.victim.auxiliary


def titles(plan: Plan, kind: str) -> list[str]:
    return [stage.title for stage in plan.stages.values() if stage.kind == kind]


def test_an_auxiliary_model_is_made_once_for_each_victim(plan: Callable[..., Plan]) -> None:
    """Whatever the number of students and attacks: here are two such defenses and two seeds."""
    found = plan({**WITH_AUXILIARY, "seeds": 2, "student.networks": ["mini-8", "mini-16"]})
    assert sorted(titles(found, "auxiliary")) == [
        f"auxiliary model of {defense}, seed {seed}" for defense in (MISINFORMATION, REDIRECTION) for seed in (0, 1)
    ]
    kinds = Counter(stage.kind for stage in found.stages.values())
    assert (kinds["train"], kinds["harden"], kinds["auxiliary"]) == (2, 2, 4)


def test_a_defense_without_an_auxiliary_model_has_no_such_stage(plan: Callable[..., Plan]) -> None:
    assert titles(plan(), "auxiliary") == []
    found = plan(WITH_AUXILIARY)
    for defense in ("none", "stingy"):
        assert all("auxiliary" not in one.stages for one in served(found, defense))
    assert not any("auxiliary" in one.stages for one in found.cells if one.defense is None)


def test_all_attack_runs_and_evaluations_of_the_defense_build_on_its_stage(plan: Callable[..., Plan]) -> None:
    found = plan(WITH_AUXILIARY)
    for defense in (REDIRECTION, MISINFORMATION):
        [key] = {one.stages["auxiliary"] for one in served(found, defense)}
        above = {
            one.stages[role] for one in served(found, defense) for role in ("steal", "evaluate", "evaluate_victim")
        }
        assert above == {stage.key for stage in found.stages.values() if key in stage.inputs}
        assert {auxiliary_of(found.stages[name]) for name in above} == {key}
    assert auxiliary_of(found.stages[cell(found, "stingy", "kd").stages["steal"]]) == ""


def test_an_auxiliary_model_is_made_for_the_model_that_is_deployed(plan: Callable[..., Plan]) -> None:
    found = plan(WITH_AUXILIARY)
    for defense, kind in ((REDIRECTION, "train"), (MISINFORMATION, "harden")):
        stages = cell(found, defense, "kd").stages
        assert stages["harden"].split("/")[0] == kind
        spec = found.stages[stages["auxiliary"]].spec
        assert isinstance(spec, AuxiliarySpec)
        assert spec.victim == stages["harden"]
        assert set(found.stages[stages["auxiliary"]].inputs) == {
            found.stages[stages["train"]].inputs[0],
            stages["harden"],
        }


def test_a_cell_names_its_stages_in_the_order_in_which_they_can_fail(plan: Callable[..., Plan]) -> None:
    stages = cell(plan(WITH_AUXILIARY), MISINFORMATION, "kd").stages
    assert tuple(stages) == STAGES_OF_CELL == ("train", "harden", "auxiliary", "steal", "evaluate", "evaluate_victim")


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({f"defense.{REDIRECTION}.epsilon": 0.5}, True),
        ({f"defense.{REDIRECTION}.epochs": 3}, True),
        ({f"defense.{REDIRECTION}.recipe.lr": 0.5}, True),
        ({"victim.recipe.lr": 0.5}, True),
        ({"victim.network": "mini-16"}, True),
        ({f"defense.{REDIRECTION}.recipe.lr": 0.05}, False),
        ({f"defense.{MISINFORMATION}.nu": 9}, False),
        ({f"defense.{MISINFORMATION}.recipe.lr": 0.5}, False),
        ({"student.recipe.lr": 0.5}, False),
        ({"student.network": "mini-16"}, False),
        ({"attack.kd.alpha": 0.5}, False),
        ({"scenario.budget": 1000}, False),
        ({"scenario.data": 0.5}, False),
        ({"robustness.level": "fast"}, False),
    ],
    ids=str,
)
def test_its_key_says_what_it_was_made_by_and_no_more(plan: Callable[..., Plan], change: Json, anew: bool) -> None:
    before, after = (
        cell(plan(changes), REDIRECTION, "kd").stages for changes in (WITH_AUXILIARY, WITH_AUXILIARY | change)
    )
    assert (before["auxiliary"] != after["auxiliary"]) == anew
    assert before["evaluate_victim"] != after["evaluate_victim"] or not anew


def test_a_defense_with_an_auxiliary_model_alone_is_bypassed_by_an_attacker_with_the_weights(
    plan: Callable[..., Plan],
) -> None:
    found = plan({**WITH_AUXILIARY, "scenario.access": "weights", "attacks": ["kd", "deep-inversion"]})
    bypassed = {(one.defense.name, one.attack.name) for one in found.cells if one.bypassed and one.defense}
    assert bypassed == {("stingy", "deep-inversion"), (REDIRECTION, "deep-inversion")}


# What a run makes of it


@pytest.fixture(scope="module")
def finished_run(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The tiny suite with two defenses that have an auxiliary model; no test changes this folder."""
    folder, progress_display = tmp_path_factory.mktemp("auxiliary"), RecordedProgress()
    return FinishedRun(folder, run(tiny(WITH_AUXILIARY), folder, progress_display), progress_display)


def test_a_run_with_auxiliary_models_ends_well(finished_run: FinishedRun) -> None:
    assert finished_run.progress_display.problems == {}
    assert {one.status for one in finished_run.cells.values()} == {Status.DONE}
    assert sorted(title for title in finished_run.progress_display.titles if title.startswith("auxiliary")) == [
        f"auxiliary model of {MISINFORMATION}, seed 0",
        f"auxiliary model of {REDIRECTION}, seed 0",
    ]


def test_the_record_of_a_cell_has_its_stage_and_what_that_cost(finished_run: FinishedRun) -> None:
    for name, one in finished_run.cells.items():
        auxiliary_seconds = name.startswith((REDIRECTION, MISINFORMATION))
        assert ("auxiliary" in one.keys) == ("auxiliary" in one.seconds) == auxiliary_seconds, name
        if auxiliary_seconds:
            assert one.seconds["auxiliary"] == round(finished_run.store.manifest(one.keys["auxiliary"]).seconds, 3)


def test_the_report_says_what_auxiliary_models_cost(finished_run: FinishedRun, tmp_path: Path) -> None:
    shutil.copy(finished_run.folder / "out" / "cells.jsonl", tmp_path)
    cost = write_report(tmp_path).read_text(encoding="utf-8").partition("## Cost")[2].splitlines()
    seconds = {one.defense.name: one.seconds for one in finished_run.cells.values() if one.defense}
    trained = [line for line in cost if line.startswith((f"| {REDIRECTION} |", f"| {MISINFORMATION} |"))]
    assert "| Defense | Mean seconds to harden | Mean seconds of its auxiliary model |" in cost
    misinformation, redirection = seconds[MISINFORMATION], seconds[REDIRECTION]
    assert trained == [
        f"| {MISINFORMATION} | {misinformation['harden']:,.2f} | {misinformation['auxiliary']:,.2f} |",
        f"| {REDIRECTION} | – | {redirection['auxiliary']:,.2f} |",
    ]
    total = misinformation["auxiliary"] + redirection["auxiliary"]
    assert f"| auxiliary | 2 | {total:,.1f} | {total / 2:,.2f} |" in cost


def test_a_second_run_makes_no_auxiliary_model_again(
    finished_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    again = run(
        tiny({**WITH_AUXILIARY, "attacks": ["kd"]}), tmp_path, progress_display, store=finished_run.folder / "store"
    )
    assert progress_display.titles == []
    assert numbers(again).items() <= numbers(finished_run.cells).items()


def test_an_auxiliary_model_that_fails_costs_the_cells_that_need_it_and_they_say_why(
    finished_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    cells = run(tiny(WITH_AUXILIARY | DIVERGES), finished_run.copy(tmp_path), progress_display)
    reason, whose = "training diverged: the loss was not finite in epoch 0", REDIRECTION
    assert progress_display.problems == {f"auxiliary model of {whose}, seed 0": reason}
    attackers = ("hard-label", "kd", "partial-kd")
    assert progress_display.lost == {
        f"evaluate {whose}, seed 0",
        *(f"{attacker} from {whose}, seed 0" for attacker in attackers),
        *(f"evaluate {attacker} on {whose}, seed 0" for attacker in attackers),
    }
    for name, one in cells.items():
        if name.startswith(whose):
            assert (one.status, one.reason, one.metrics) == (Status.FAILED, reason, {}), name
        else:
            assert numbers({name: one}) == numbers({name: finished_run.cells[name]})


def test_under_low_precision_a_run_with_auxiliary_models_ends_well_too(
    tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """`fit` asks its teacher under autocast, in which torch's forward-mode derivatives of a convolution fail."""
    changes = {
        "precision": "bf16",
        "defenses": ["none", REDIRECTION, MISINFORMATION],
        "attacks": ["kd"],
        "baselines": [],
    }
    progress_display = RecordedProgress()
    run(tiny(WITH_AUXILIARY | changes), tmp_path, progress_display)
    assert progress_display.problems == {}


# What defenses are given


@dataclass
class Seen:
    """What the defense below was given."""

    makers: list[tuple[nn.Module, Context]] = field(default_factory=list)
    servers: list[tuple[nn.Module, Context]] = field(default_factory=list)


@dataclass(frozen=True)
class Helped(Defense):
    """Its auxiliary model is a fresh network; it writes down what it gets."""

    seen: ClassVar[Seen] = Seen()

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module | None:
        self.seen.makers.append((model, ctx))
        return ctx.new_student()

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        self.seen.servers.append((model, ctx))

        def answer(x: Tensor) -> Tensor:
            logits: Tensor = model(x)
            return logits.log_softmax(dim=1)

        return answer


class Empty(Helped):
    """Says that it has an auxiliary model and makes none."""

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module | None:
        return None


class Larger(Helped):
    """Its auxiliary model is of another architecture."""

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module | None:
        return ctx.new_student("mini-16")


class Broken(Helped):
    """Its auxiliary model answers nothing that is a number."""

    def auxiliary(self, model: nn.Module, ctx: Context) -> nn.Module | None:
        made = ctx.new_student()
        nn.init.constant_(next(made.parameters()), torch.inf)
        return made


@pytest.fixture(autouse=True)
def unknown_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the defenses above under their names in lower case."""
    extra: Json = {"helped": Helped, "empty": Empty, "larger": Larger, "broken": Broken}
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: extra.get(name) or load(kind, name))
    Helped.seen.makers.clear()
    Helped.seen.servers.clear()


@pytest.fixture
def rerun(finished_run: FinishedRun, tmp_path: Path) -> Rerun:
    return Rerun(finished_run.store, tmp_path)


@pytest.fixture
def stage(finished_run: FinishedRun) -> Callable[[str], Stage]:
    """A stage of the run above by its title, without its seed."""
    stages = {stage.title: stage for stage in finished_run.progress_display.finished}
    return lambda title: stages[f"{title}, seed 0"]


@pytest.mark.parametrize("whose", [REDIRECTION, MISINFORMATION])
def test_the_stage_run_here_leaves_the_bits_that_a_worker_left(
    finished_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage], whose: str
) -> None:
    made = stage(f"auxiliary model of {whose}")
    _, out = rerun.run(made.spec)
    files = {path.name: file_digest(path) for path in out.iterdir()}
    assert files == finished_run.store.manifest(made.key).files
    assert WEIGHTS in files


@pytest.mark.parametrize(("whose", "deployed"), [(REDIRECTION, "train the victim"), (MISINFORMATION, "harden by")])
def test_an_auxiliary_model_is_made_from_the_deployed_model_and_the_owners_images(
    finished_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage], whose: str, deployed: str
) -> None:
    title = deployed if whose == REDIRECTION else f"{deployed} {whose}"
    rerun.run(hardened_by(stage(f"auxiliary model of {whose}").spec, "helped"))
    [(model, ctx)] = Helped.seen.makers
    kept = load_tensors(finished_run.store.path(stage(title).key) / WEIGHTS)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(ctx.data.x, blobs().train.x)
    assert ctx.auxiliary is None
    assert Helped.seen.servers == []


def test_it_draws_other_numbers_and_starts_from_other_weights_than_hardening(
    rerun: Rerun, stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def harden(self: Helped, victim: nn.Module, ctx: Context) -> nn.Module:
        self.seen.makers.append((victim, ctx))
        return ctx.new_student()

    monkeypatch.setattr(Helped, "harden", harden)
    drawn = []
    for title in ("harden by", "auxiliary model of"):
        rerun.run(hardened_by(stage(f"{title} {MISINFORMATION}").spec, "helped"))
        ctx = Helped.seen.makers[-1][1]
        fresh = torch.cat([weight.detach().flatten() for weight in ctx.new_student().parameters()])
        drawn.append((ctx.seed, torch.rand(3, generator=ctx.generator), fresh))
    (seed, random, weights), (other, others, fresh) = drawn
    assert seed != other
    assert not torch.equal(random, others)
    assert not torch.equal(weights, fresh)


@pytest.mark.parametrize(
    "title", [f"kd from {REDIRECTION}", f"evaluate kd on {REDIRECTION}", f"evaluate {REDIRECTION}"]
)
def test_a_service_gets_the_kept_auxiliary_model_in_eval_mode_without_gradients(
    finished_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage], title: str
) -> None:
    """The one that its stage left, for attack runs and evaluations alike; it is not made again."""
    rerun.run(behind(stage(title).spec, "helped"))
    [(model, ctx)] = Helped.seen.servers
    assert Helped.seen.makers == []
    assert ctx.auxiliary is not None
    assert ctx.auxiliary is not model
    kept = load_tensors(finished_run.store.path(stage(f"auxiliary model of {REDIRECTION}").key) / WEIGHTS)
    assert all(torch.equal(value, kept[name]) for name, value in ctx.auxiliary.state_dict().items())
    assert not any(module.training for module in ctx.auxiliary.modules())
    assert not any(weight.requires_grad for weight in ctx.auxiliary.parameters())


def test_a_service_without_an_auxiliary_model_is_handed_none(rerun: Rerun, stage: Callable[[str], Stage]) -> None:
    evaluation = stage("evaluate stingy")
    rerun.run(behind(evaluation.spec, "helped"))
    [(_, ctx)] = Helped.seen.servers
    assert ctx.auxiliary is None


@pytest.mark.parametrize(
    ("defense", "said"),
    [
        ("empty", "The auxiliary of the defense 'empty' must return a network, or not be overridden."),
        ("larger", "The auxiliary of the defense 'larger' must return a network of its side's architecture 'mini-8', "),
        ("broken", "The auxiliary of the defense 'broken' returned a network whose answers are not finite: "),
    ],
)
def test_what_is_no_auxiliary_model_is_refused(
    rerun: Rerun, stage: Callable[[str], Stage], defense: str, said: str
) -> None:
    with pytest.raises(KdbenchError) as caught:
        rerun.run(hardened_by(stage(f"auxiliary model of {REDIRECTION}").spec, defense))
    assert str(caught.value).startswith(said)


def test_fused_stages_share_a_service_only_with_the_same_auxiliary_model(
    finished_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage]
) -> None:
    workspace, data = rerun.workspace(FusedStages()), blobs().train
    other = stage(f"auxiliary model of {MISINFORMATION}").key
    spec = stage(f"kd from {REDIRECTION}").spec
    shared, own = behind(spec, "helped"), behind(spec, "helped", auxiliary=other)
    assert shared.victim
    assert own.victim
    role = Role.ATTACKED_SERVICE
    first, again = (open_service(shared.victim, spec.numerics, workspace, data, role) for _ in range(2))
    second = open_service(own.victim, spec.numerics, workspace, data, role)
    assert first == again
    assert first[0] is not second[0]
    assert len(Helped.seen.servers) == 2
    one, two = (ctx.auxiliary for _, ctx in Helped.seen.servers)
    assert one is not None
    assert two is not None
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
