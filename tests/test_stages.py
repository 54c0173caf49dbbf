"""What each kind of stage does, played in this process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from helpers import blobs
from kdbench import registry
from kdbench.api import UNKNOWN, Access, Attack, Context, Defense, KdbenchError, Oracle, Service, predict_logits
from kdbench.engine import stage_log
from kdbench.engine.plan import Stage
from kdbench.engine.stage_log import StageLog
from kdbench.engine.stages import TENSORS, ModelFactory, Workspace, run_stage
from kdbench.engine.store import Store, file_digest
from kdbench.engine.tensors import load_tensors
from runs import Json, Played


@dataclass
class Room:
    """Where stages of the golden store are played again; the store is only read."""

    store: Store
    folder: Path
    attempts: int = 0

    def play(self, stage: Stage, spec: Mapping[str, Any] | None = None) -> tuple[dict[str, float], Path]:
        """The stage's numbers, and the folder it filled."""
        return run_stage(stage.kind, spec or stage.spec, workspace := self.workspace()), workspace.out

    def workspace(self) -> Workspace:
        self.attempts += 1
        out = self.folder / f"out{self.attempts}"
        work = self.folder / f"work{self.attempts}"
        out.mkdir()
        work.mkdir()
        return Workspace(self.store, out, StageLog(out, work), "cpu", self.folder)


@pytest.fixture
def room(golden: Played, tmp_path: Path) -> Room:
    return Room(golden.store, tmp_path)


@pytest.fixture
def stage(golden: Played) -> Callable[[str], Stage]:
    """A stage of the golden run by its label."""
    stages = {stage.title: stage for stage in golden.progress_display.finished}
    return lambda label: stages[label]


@dataclass(frozen=True)
class Spy(Attack):
    """Writes down what it was given, and asks about all its images once."""

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
class Swindler(Attack):
    """Hands in a network of another architecture."""

    needs: ClassVar[Access] = Access.NOTHING

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        return ctx.new_student("mini-16")


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the methods above under their names in lower case."""
    extra: dict[str, Any] = {"spy": Spy, "tired": Tired, "swindler": Swindler}
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: extra.get(name) or load(kind, name))
    for kept in (Spy.seen, Spy.answers, Tired.seeds):
        kept.clear()


def with_attack(stage: Stage, method: str, **changes: Any) -> Json:
    """The specification of a theft with another attack and a changed threat."""
    threat = {**stage.spec["scenario"], **changes}
    return {**stage.spec, "attack": {"method": method, "fields": {}, "source": ""}, "scenario": threat}


def test_every_stage_played_here_leaves_the_bits_that_a_worker_left(golden: Played, room: Room) -> None:
    for stage in golden.progress_display.finished:
        found, out = room.play(stage)
        assert found == golden.store.manifest(stage.key)["metrics"], stage.title
        files = {path.name: file_digest(path) for path in out.iterdir()}
        assert files == golden.store.manifest(stage.key)["files"], stage.title


def test_a_data_stage_holds_images_as_tensors_and_counts_them(golden: Played, stage: Callable[[str], Stage]) -> None:
    key = stage("read blobs").key
    tensors = load_tensors(golden.store.path(key) / TENSORS)
    data = blobs()
    assert golden.store.manifest(key)["metrics"] == {"classes": 3, "train": 96, "validation": 96, "test": 96}
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        assert torch.equal(tensors[f"{name}.x"], split.x)
        assert torch.equal(tensors[f"{name}.y"], split.y)


def test_queries_are_counted_by_the_runner(golden: Played) -> None:
    assert golden.cells["none--kd--mini-8--seed0"].metrics["queries"] == 2 * 96
    assert golden.cells["none--partial-kd--mini-8--seed0"].metrics["queries"] == 2 * 48
    assert golden.cells["baseline-1-0--cross-entropy--mini-8--seed0"].metrics["queries"] == 0


@pytest.mark.usefixtures("strangers")
def test_a_thief_gets_the_share_of_images_that_it_owns_and_labels_only_if_granted(
    room: Room, stage: Callable[[str], Stage]
) -> None:
    attack_run = stage("kd from none, seed 0")
    room.play(attack_run, with_attack(attack_run, "spy"))
    room.play(attack_run, with_attack(attack_run, "spy", data=0.5))
    room.play(attack_run, with_attack(attack_run, "spy", data=0.5, labels=False))
    room.play(attack_run, {**with_attack(attack_run, "spy", data=0.5), "subset": {"fraction": 0.25, "seed": 0}})
    whole, half_width, blind, part = (ctx.data for ctx in Spy.seen)
    assert [len(data) for data in (whole, half_width, blind, part)] == [96, 48, 48, 12]
    assert torch.equal(half_width.x, blind.x)
    assert (blind.y == UNKNOWN).all()
    assert half_width.labelled
    subset = {x.numpy().tobytes() for x in half_width.x}
    assert {x.numpy().tobytes() for x in part.x} < subset < {x.numpy().tobytes() for x in blobs().train.x}
    assert half_width.y.bincount().tolist() == [16, 16, 16]


@pytest.mark.usefixtures("strangers")
def test_a_thief_sees_no_more_than_is_granted(room: Room, stage: Callable[[str], Stage]) -> None:
    attack_run = stage("kd from none, seed 0")
    for answers in ("label", "topk", "probs"):
        room.play(attack_run, with_attack(attack_run, "spy", answers=answers, topk=2))
    revealed = [answer.isfinite().sum(dim=1).unique().tolist() for answer in Spy.answers]
    assert revealed == [[1], [2], [3]]


@pytest.mark.usefixtures("strangers")
def test_the_thief_and_the_public_are_served_apart(room: Room, stage: Callable[[str], Stage]) -> None:
    attack_run, score = stage("kd from none, seed 0"), stage("score kd on none, seed 0")
    victim = {**attack_run.spec["victim"], "defense": {"method": "tired", "fields": {}, "source": ""}}
    alone, _ = room.play(score, {**score.spec, "victim": victim})
    room.play(attack_run, {**with_attack(attack_run, "spy"), "victim": victim})
    after, _ = room.play(score, {**score.spec, "victim": victim})
    assert after == alone
    surrogate, attacker, again = Tired.seeds
    assert surrogate == again != attacker


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("defense", "kept"), [("tired", False), ("stingy", True)])
def test_a_stateful_service_switches_checkpoints_off(
    room: Room, stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch, defense: str, kept: bool
) -> None:
    monkeypatch.setattr(stage_log, "CHECKPOINT_SECONDS", 0.0)
    attack_run = stage("kd from none, seed 0")
    victim = {**attack_run.spec["victim"], "defense": {"method": defense, "fields": {}, "source": ""}}
    workspace = room.workspace()
    run_stage("steal", {**attack_run.spec, "victim": victim}, workspace)
    assert workspace.stage_log.resumable is kept
    assert [path.name for path in room.folder.glob("work*/*")] == (["part-1.safetensors"] if kept else [])


@pytest.mark.usefixtures("strangers")
def test_a_network_of_another_architecture_is_refused(room: Room, stage: Callable[[str], Stage]) -> None:
    attack_run = stage("cross-entropy on 100% of the data, seed 0")
    with pytest.raises(KdbenchError, match=r"steal of the attack 'swindler' must return .* architecture 'mini-8'"):
        room.play(attack_run, with_attack(attack_run, "swindler"))


def test_a_network_depends_on_the_seed_the_role_and_its_number_and_on_no_draw() -> None:
    data = blobs().train

    def weights(make: ModelFactory, name: str | None = None) -> Tensor:
        return torch.cat([p.detach().flatten() for p in make(name).parameters()])

    def factory(seed: int = 0, role: str = "student") -> ModelFactory:
        return ModelFactory("mini-8", data, seed, role, "cpu")

    first, second = (weights(make) for make in [factory()] * 2)
    torch.rand(7)
    assert torch.equal(weights(factory()), first)
    assert not torch.equal(first, second)
    assert not torch.equal(weights(factory(seed=1)), first)
    assert not torch.equal(weights(factory(role="victim")), first)
    assert len(weights(factory(), "mini-16")) > len(first)


def test_making_a_network_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ModelFactory("mini-8", blobs().train, 0, Role.STUDENT_WEIGHTS, "cpu")()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("images", [96, 0])
def test_a_broken_network_is_no_result(images: int, room: Room) -> None:
    factory = ModelFactory("mini-8", blobs().train.take(torch.arange(images)), 0, Role.STUDENT_WEIGHTS, "cpu")
    network = factory()
    nn.utils.vector_to_parameters(torch.full((10_000,), torch.nan), network.parameters())
    with pytest.raises(KdbenchError, match="The attack returned a network whose answers are not finite"):
        factory.save(room.workspace(), network, "attack")


@pytest.mark.parametrize("images", [96, 0])
def test_normalisation_lives_inside_the_network(images: int) -> None:
    """By the images of its owner; a thief without any assumes mid-grey and a deviation of a quarter."""
    data = blobs().train
    network = ModelFactory("mini-8", data.take(torch.arange(images)), 0, Role.STUDENT_WEIGHTS, "cpu")()
    assert isinstance(network, nn.Sequential)
    inside = predict_logits(network[0], data.x)
    mean, std = (data.x.mean(), data.x.std()) if images else (0.5, 0.25)
    torch.testing.assert_close(inside, (data.x - mean) / std)
