"""What each kind of stage does, run in this process."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from stage_runs import Rerun, behind, method, with_attack
from torch import Tensor, nn

from helpers import blobs
from kdbench import registry
from kdbench.api import (
    UNKNOWN,
    Access,
    Attack,
    Context,
    DataSubset,
    Defense,
    KdbenchError,
    Oracle,
    Service,
    predict_logits,
)
from kdbench.engine import stage_log
from kdbench.engine.digests import file_digest
from kdbench.engine.models import ModelFactory
from kdbench.engine.plan import Stage
from kdbench.engine.stages import PREDICTIONS, run_stage
from kdbench.engine.tensors import load_tensors
from kdbench.engine.victims import Trained, Victim
from kdbench.engine.workspace import TENSORS
from kdbench.game.roles import Role
from runs import FinishedRun


@pytest.fixture
def rerun(golden: FinishedRun, tmp_path: Path) -> Rerun:
    return Rerun(golden.store, tmp_path)


@pytest.fixture
def stage(golden: FinishedRun) -> Callable[[str], Stage]:
    """A stage of the golden run by its title."""
    stages = {stage.title: stage for stage in golden.progress_display.finished}
    return lambda title: stages[title]


@dataclass(frozen=True)
class Spy(Attack):
    """Keeps what it was given, and queries all its images once."""

    needs: ClassVar[Access] = Access.LABEL
    seen: ClassVar[list[Context]] = []
    answers: ClassVar[list[Tensor]] = []

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        self.seen.append(ctx)
        self.answers.append(oracle(ctx.data.x))
        return ctx.new_student()


@dataclass(frozen=True)
class Tired(Defense):
    """Answers at random after the first so many questions: what it answers depends on what was asked."""

    stateful: ClassVar[bool] = True
    seeds: ClassVar[list[int]] = []

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        asked = torch.zeros(())
        self.seeds.append(ctx.seed)

        def answer(x: Tensor) -> Tensor:
            asked.add_(len(x))
            logits: Tensor = model(x) / (1 + asked)
            return logits.log_softmax(dim=1)

        return answer


@dataclass(frozen=True)
class Cheating(Attack):
    """Returns a network of another architecture."""

    needs: ClassVar[Access] = Access.NOTHING

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return ctx.new_student("mini-16")


@pytest.fixture
def unknown_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the methods above under their names in lower case."""
    extra: dict[str, Any] = {"remote": Remote, "greedy": Greedy, "spy": Spy, "tired": Tired, "cheating": Cheating}
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: extra.get(name) or load(kind, name))
    for kept in (Spy.seen, Spy.answers, Tired.seeds):
        kept.clear()


def test_every_stage_run_here_leaves_the_bits_that_a_worker_left(golden: FinishedRun, rerun: Rerun) -> None:
    for stage in golden.progress_display.finished:
        manifest = golden.store.manifest(stage.key)
        metrics, out = rerun.run(stage.spec)
        assert metrics == manifest.metrics, stage.title
        assert {path.name: file_digest(path) for path in out.iterdir()} == manifest.files, stage.title


def test_a_data_stage_holds_images_as_tensors_and_counts_them(
    golden: FinishedRun, stage: Callable[[str], Stage]
) -> None:
    key = stage("read blobs").key
    tensors = load_tensors(golden.store.path(key) / TENSORS)
    data = blobs()
    assert golden.store.manifest(key).numbers == {"classes": 3, "train": 96, "validation": 96, "test": 96}
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        assert torch.equal(tensors[f"{name}.x"], split.x)
        assert torch.equal(tensors[f"{name}.y"], split.y)


def test_queries_are_counted_by_the_engine(golden: FinishedRun) -> None:
    assert golden.cells["none--kd--mini-8--seed0"].metrics["queries"] == 2 * 96
    assert golden.cells["none--partial-kd--mini-8--seed0"].metrics["queries"] == 2 * 48
    assert golden.cells["baseline-1-0--cross-entropy--mini-8--seed0"].metrics["queries"] == 0


@pytest.mark.usefixtures("unknown_methods")
def test_an_attacker_gets_its_subset_of_the_images_and_labels_only_if_granted(
    rerun: Rerun, stage: Callable[[str], Stage]
) -> None:
    spec = stage("kd from none, seed 0").spec
    for scenario in ({}, {"data": 0.5}, {"data": 0.5, "labels": False}):
        rerun.run(with_attack(spec, "spy", **scenario))
    half = with_attack(spec, "spy", data=0.5)
    rerun.run(replace(half, attack=replace(half.attack, subset=DataSubset(0.25))))
    whole, some, unlabelled, quarter = (ctx.data for ctx in Spy.seen)
    assert [len(data) for data in (whole, some, unlabelled, quarter)] == [96, 48, 48, 12]
    assert torch.equal(some.x, unlabelled.x)
    assert (unlabelled.y == UNKNOWN).all()
    assert some.labelled
    subset = {x.numpy().tobytes() for x in some.x}
    assert {x.numpy().tobytes() for x in quarter.x} < subset < {x.numpy().tobytes() for x in blobs().train.x}
    assert some.y.bincount().tolist() == [16, 16, 16]


@pytest.mark.usefixtures("unknown_methods")
def test_an_attacker_sees_no_more_than_is_granted(rerun: Rerun, stage: Callable[[str], Stage]) -> None:
    for access in (Access.LABEL, Access.TOPK, Access.PROBS):
        rerun.run(with_attack(stage("kd from none, seed 0").spec, "spy", access=access, topk=2))
    revealed = [answer.isfinite().sum(dim=1).unique().tolist() for answer in Spy.answers]
    assert revealed == [[1], [2], [3]]


@pytest.mark.usefixtures("unknown_methods")
def test_the_attacker_and_the_evaluation_are_served_apart(rerun: Rerun, stage: Callable[[str], Stage]) -> None:
    evaluation = behind(stage("evaluate kd on none, seed 0").spec, "tired")
    alone, _ = rerun.run(evaluation)
    rerun.run(behind(with_attack(stage("kd from none, seed 0").spec, "spy"), "tired"))
    after, _ = rerun.run(evaluation)
    assert after == alone
    evaluated, attacked, again = Tired.seeds
    assert evaluated == again != attacked


@pytest.mark.usefixtures("unknown_methods")
@pytest.mark.parametrize(("defense", "kept"), [("tired", False), ("stingy", True)])
def test_a_stateful_service_switches_checkpoints_off(
    rerun: Rerun, stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch, defense: str, kept: bool
) -> None:
    monkeypatch.setattr(stage_log, "CHECKPOINT_SECONDS", 0.0)
    workspace = rerun.workspace()
    run_stage(behind(stage("kd from none, seed 0").spec, defense), workspace)
    assert workspace.stage_log.resumable is kept
    assert [path.name for path in rerun.folder.glob("checkpoints*/*")] == (["fit.1.safetensors"] if kept else [])


@pytest.mark.usefixtures("unknown_methods")
def test_a_network_of_another_architecture_is_refused(rerun: Rerun, stage: Callable[[str], Stage]) -> None:
    with pytest.raises(KdbenchError, match=r"steal of the attack 'cheating' must return .* architecture 'mini-8'"):
        rerun.run(with_attack(stage("cross-entropy on 100% of the data, seed 0").spec, "cheating"))


def test_a_network_depends_on_the_seed_the_role_and_its_number_and_on_no_draw() -> None:
    data = blobs().train

    def weights(make: ModelFactory, name: str | None = None) -> Tensor:
        return torch.cat([p.detach().flatten() for p in make(name).parameters()])

    def factory(seed: int = 0, role: Role = Role.STUDENT_WEIGHTS) -> ModelFactory:
        return ModelFactory("mini-8", data, seed, role, "cpu")

    first, second = (weights(make) for make in [factory()] * 2)
    torch.rand(7)
    assert torch.equal(weights(factory()), first)
    assert not torch.equal(first, second)
    assert not torch.equal(weights(factory(seed=1)), first)
    assert not torch.equal(weights(factory(role=Role.VICTIM_WEIGHTS)), first)
    assert len(weights(factory(), "mini-16")) > len(first)


def test_making_a_network_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ModelFactory("mini-8", blobs().train, 0, Role.STUDENT_WEIGHTS, "cpu")()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("images", [96, 0])
def test_a_network_whose_answers_are_not_finite_is_refused(images: int, rerun: Rerun) -> None:
    factory = ModelFactory("mini-8", blobs().train.take(torch.arange(images)), 0, Role.STUDENT_WEIGHTS, "cpu")
    network = factory()
    nn.utils.vector_to_parameters(torch.full((10_000,), torch.nan), network.parameters())
    with pytest.raises(KdbenchError, match="The attack returned a network whose answers are not finite"):
        factory.save(network, rerun.folder, "attack")


@pytest.mark.parametrize("images", [96, 0])
def test_normalisation_lives_inside_the_network(images: int) -> None:
    """By the images of who trains it; an attacker without any assumes mid-grey and a deviation of a quarter."""
    data = blobs().train
    network = ModelFactory("mini-8", data.take(torch.arange(images)), 0, Role.STUDENT_WEIGHTS, "cpu")()
    assert isinstance(network, nn.Sequential)
    inside = predict_logits(network[0], data.x)
    mean, std = (data.x.mean(), data.x.std()) if images else (0.5, 0.25)
    torch.testing.assert_close(inside, (data.x - mean) / std)


def test_evaluations_keep_their_predictions(golden: FinishedRun, stage: Callable[[str], Stage]) -> None:
    """Labels of all test and validation images; of a service also its confidence. Accuracies are functions of them."""
    data = blobs()
    for title, side in (("evaluate none, seed 0", "victim"), ("evaluate kd on none, seed 0", "student")):
        key = stage(title).key
        kept, metrics = load_tensors(golden.store.path(key) / PREDICTIONS), golden.store.manifest(key).metrics
        assert set(kept) == {"test", "validation"} | ({"confidence"} if side == "victim" else set())
        assert metrics[f"{side}_acc"] == (kept["test"] == data.test.y).double().mean().item()
        assert metrics[f"{side}_val_acc"] == (kept["validation"] == data.validation.y).double().mean().item()


@dataclass(frozen=True)
class Remote(Victim):
    """Answers without a network at hand: always the first class."""

    has_model: ClassVar[bool] = False

    def open(self, model: nn.Module | None, defense: Defense, ctx: Context) -> tuple[Service, nn.Module | None]:
        return lambda x: torch.tensor([0.9, 0.05, 0.05]).log().expand(len(x), 3), model


@pytest.mark.usefixtures("unknown_methods")
def test_a_victim_without_a_network_at_hand_answers_and_grants_no_weights(
    rerun: Rerun, stage: Callable[[str], Stage]
) -> None:
    spec = stage("kd from none, seed 0").spec
    rerun.run(behind(with_attack(spec, "spy"), "none", victim=method("remote")))
    assert Spy.answers[0].argmax(dim=1).unique().tolist() == [0]
    greedy = with_attack(spec, "greedy", access=Access.WEIGHTS)
    with pytest.raises(KdbenchError, match="a victim whose network is not at hand"):
        rerun.run(behind(greedy, "none", victim=method("remote")))


def test_a_victim_is_a_registered_kind() -> None:
    assert registry.load("victim", "trained") is Trained


@dataclass(frozen=True)
class Greedy(Attack):
    """Asks for the weights."""

    needs: ClassVar[Access] = Access.WEIGHTS

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return oracle.model()
