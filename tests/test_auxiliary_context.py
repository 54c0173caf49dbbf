"""The auxiliary model in the context: what makes it, who is handed it, and which networks are refused."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from auxiliary_runs import MISINFORMATION, REDIRECTION
from stage_runs import Rerun, behind, hardened_by
from torch import Tensor, nn

from helpers import blobs
from kdbench import registry
from kdbench.api import Context, Defense, KdbenchError, Service
from kdbench.engine.digests import file_digest
from kdbench.engine.models import WEIGHTS
from kdbench.engine.plan import Stage
from kdbench.engine.tensors import load_tensors
from kdbench.engine.victims import open_service
from kdbench.engine.workspace import FusedStages
from kdbench.game.roles import Role
from runs import FinishedRun, Json


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
def rerun(auxiliary_run: FinishedRun, tmp_path: Path) -> Rerun:
    return Rerun(auxiliary_run.store, tmp_path)


@pytest.fixture
def stage(auxiliary_run: FinishedRun) -> Callable[[str], Stage]:
    """A stage of the run above by its title, without its seed."""
    stages = {stage.title: stage for stage in auxiliary_run.progress_display.finished}
    return lambda title: stages[f"{title}, seed 0"]


@pytest.mark.parametrize("whose", [REDIRECTION, MISINFORMATION])
def test_the_stage_run_here_leaves_the_bits_that_a_worker_left(
    auxiliary_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage], whose: str
) -> None:
    made = stage(f"auxiliary model of {whose}")
    _, out = rerun.run(made.spec)
    files = {path.name: file_digest(path) for path in out.iterdir()}
    assert files == auxiliary_run.store.manifest(made.key).files
    assert WEIGHTS in files


@pytest.mark.parametrize(("whose", "deployed"), [(REDIRECTION, "train the victim"), (MISINFORMATION, "harden by")])
def test_an_auxiliary_model_is_made_from_the_deployed_model_and_the_owners_images(
    auxiliary_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage], whose: str, deployed: str
) -> None:
    title = deployed if whose == REDIRECTION else f"{deployed} {whose}"
    rerun.run(hardened_by(stage(f"auxiliary model of {whose}").spec, "helped"))
    [(model, ctx)] = Helped.seen.makers
    kept = load_tensors(auxiliary_run.store.path(stage(title).key) / WEIGHTS)
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
    auxiliary_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage], title: str
) -> None:
    """The one that its stage left, for attack runs and evaluations alike; it is not made again."""
    rerun.run(behind(stage(title).spec, "helped"))
    [(model, ctx)] = Helped.seen.servers
    assert Helped.seen.makers == []
    assert ctx.auxiliary is not None
    assert ctx.auxiliary is not model
    kept = load_tensors(auxiliary_run.store.path(stage(f"auxiliary model of {REDIRECTION}").key) / WEIGHTS)
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
    auxiliary_run: FinishedRun, rerun: Rerun, stage: Callable[[str], Stage]
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
