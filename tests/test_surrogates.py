"""Surrogate data: planned once, part of the keys of its attack runs, and handed to no other attack."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from stage_runs import Rerun, with_attack
from surrogate_runs import PHOTOS, WITH_SURROGATES
from torch import Tensor, nn

from helpers import blobs
from kdbench import registry
from kdbench.api import Access, Attack, Context, DataSubset, KdbenchError, Oracle
from kdbench.engine.numerics import Numerics
from kdbench.engine.parts import DataRef, SurrogateSpec
from kdbench.engine.plan import Plan
from kdbench.engine.planner import data_stage, make_plan
from kdbench.engine.specs import StealSpec
from kdbench.engine.store import Store
from kdbench.engine.tensors import load_tensors
from kdbench.engine.workspace import TENSORS
from kdbench.game.data import resized
from kdbench.records import Status
from kdbench.suites.suite import Suite
from runs import FinishedRun, Json, RecordedProgress, cell, numbers, run

# What is planned


@pytest.fixture
def with_surrogates(tiny: Callable[..., Suite]) -> Callable[..., Plan]:
    """Plans the tiny suite with attacks that use surrogate data of made-up content."""

    def make(changes: Mapping[str, Any] | None = None, content: str = "p", **contents: str) -> Plan:
        suite = tiny({"attacks": ["kd", "knockoff"], **(changes or {})})
        surrogates = {choice.name: contents.get(choice.name, content) for choice in suite.surrogates}
        return make_plan(suite, Numerics(), "d", surrogates)

    return make


TWO: Json = {
    "attacks": ["kd", "knockoff", "adaptive-knockoff"],
    "attack.adaptive-knockoff": {"method": "knockoff", "policy": "adaptive"},
}


def test_surrogate_data_is_read_once_and_only_attack_runs_that_use_it_build_on_it(
    with_surrogates: Callable[..., Plan],
) -> None:
    found = with_surrogates({**TWO, "seeds": 2, "student.networks": ["mini-8", "mini-16"]})
    assert Counter(stage.title for stage in found.stages.values() if stage.kind == "data") == {
        "read blobs": 1,
        "read photos": 1,
    }
    [photos] = [key for key, stage in found.stages.items() if stage.title == "read photos"]
    drawing = {one.stages["steal"] for one in found.cells if one.attack.method == "knockoff"}
    assert drawing == {key for key, stage in found.stages.items() if photos in stage.inputs}
    assert len(drawing) == 2 * 3 * 2 * 2
    for key, stage in found.stages.items():
        if stage.kind == "steal":
            assert isinstance(stage.spec, StealSpec)
            spec = SurrogateSpec("photos", DataRef(photos, "p"))
            assert stage.spec.attack.surrogates == ((spec,) if key in drawing else ())


def test_surrogate_data_comes_before_the_attack_runs_that_use_it(with_surrogates: Callable[..., Plan]) -> None:
    before: set[str] = set()
    for key, stage in with_surrogates(TWO).stages.items():
        assert set(stage.inputs) <= before
        before.add(key)


def test_surrogate_data_is_read_as_the_data_set_of_a_victim_is(
    with_surrogates: Callable[..., Plan], tiny: Callable[..., Suite]
) -> None:
    about = tiny({"dataset": "photos"}).dataset
    assert data_stage(about).key in with_surrogates().stages


def test_the_content_of_surrogate_data_is_part_of_the_keys_of_its_attack_runs(
    with_surrogates: Callable[..., Plan],
) -> None:
    before, after = with_surrogates(), with_surrogates(content="q")
    anew = {stage.title for key, stage in after.stages.items() if key not in before.stages}
    defenses = ("none", "nasty", "stingy")
    assert anew == {f"{text} {one}, seed 0" for text in ("knockoff from", "evaluate knockoff on") for one in defenses}
    assert len(before.stages) == len(after.stages)


def test_each_surrogate_data_set_counts_for_its_own_attacks(with_surrogates: Callable[..., Plan]) -> None:
    two = {"attacks": ["knockoff", "digital"], "attack.digital": {"method": "knockoff", "surrogate": "digits"}}
    before, after = with_surrogates(two), with_surrogates(two, digits="q")
    for attack, same in (("knockoff", True), ("digital", False)):
        keys = [cell(found, "none", attack).stages["steal"] for found in (before, after)]
        assert (keys[0] == keys[1]) is same, attack


def test_an_attacker_with_surrogate_data_alone_has_no_baseline_of_its_own(with_surrogates: Callable[..., Plan]) -> None:
    found = with_surrogates({"attacks": ["knockoff"]})
    assert cell(found, "none", "knockoff").subset == DataSubset(fraction=0.0)
    assert {one.subset.fraction for one in found.cells if one.defense is None} == {1.0}
    assert not cell(with_surrogates({"scenario.data": 0}), "none", "knockoff").skipped


# What a run makes of it


def test_an_attack_with_surrogate_data_ends_well(surrogate_run: FinishedRun) -> None:
    assert surrogate_run.progress_display.problems == {}
    [(name, found)] = surrogate_run.cells.items()
    assert name == "none--knockoff--mini-8--seed0"
    assert (found.status, found.metrics["queries"], found.numbers["steal.asked"]) == (Status.DONE, 64, 64)
    assert found.attack.fields["surrogate"] == "photos"
    assert sorted(surrogate_run.progress_display.titles) == sorted(
        [
            "knockoff from none, seed 0",
            "read blobs",
            "read photos",
            "evaluate knockoff on none, seed 0",
            "evaluate none, seed 0",
            "train the victim, seed 0",
        ]
    )


def test_surrogate_data_that_was_read_is_not_read_again(
    surrogate_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    again = run(
        tiny({**WITH_SURROGATES, "attack.knockoff.queries": 32}), surrogate_run.copy(tmp_path), progress_display
    )
    assert sorted(progress_display.titles) == ["evaluate knockoff on none, seed 0", "knockoff from none, seed 0"]
    assert [one.metrics["queries"] for one in again.values()] == [32]
    progress_display = RecordedProgress()
    forced = run(tiny(WITH_SURROGATES), tmp_path / "forced", progress_display, store=tmp_path / "store", force=True)
    assert not [title for title in progress_display.titles if title.startswith("read")]
    assert numbers(forced) == numbers(surrogate_run.cells)


def test_surrogate_data_whose_files_are_missing_is_said_before_any_training(
    surrogate_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    folder = surrogate_run.copy(tmp_path)
    with pytest.raises(KdbenchError, match="cifar-10"):
        run(
            tiny({**WITH_SURROGATES, "attack.knockoff.surrogate": "cifar10"}),
            folder,
            progress_display,
            data_dir=tmp_path / "empty",
        )
    assert progress_display.titles == ["read cifar10"]
    assert Store(folder / "store").finished() == surrogate_run.store.finished()


# What an attack is given


@dataclass
class Found:
    """What the attack below saw."""

    contexts: list[Context] = field(default_factory=list)


@dataclass(frozen=True)
class Looking(Attack):
    """Keeps what it is given and trains nothing."""

    needs: ClassVar[Access] = Access.LABEL
    found: ClassVar[Found] = Found()

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        self.found.contexts.append(ctx)
        return ctx.new_student()


@pytest.fixture
def given_to(surrogate_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Context]:
    """What an attack gets whose run is like the one above, but for some parts of its specification."""
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: Looking if name == "looking" else load(kind, name))
    [attack_run] = [stage for stage in surrogate_run.progress_display.finished if stage.kind == "steal"]

    rerun = Rerun(surrogate_run.store, tmp_path)

    def rerun_with(**changes: Any) -> Context:
        Looking.found.contexts.clear()
        spec = with_attack(attack_run.spec, "looking")
        rerun.run(replace(spec, attack=replace(spec.attack, **changes)))
        [context] = Looking.found.contexts
        return context

    return rerun_with


def surrogate_tensors(surrogate_run: FinishedRun) -> Mapping[str, Tensor]:
    """The tensors of the surrogate data as they lie in the store."""
    [photos] = [stage.key for stage in surrogate_run.progress_display.finished if stage.title == "read photos"]
    return load_tensors(surrogate_run.store.path(photos) / TENSORS)


def test_an_attacker_gets_the_training_images_of_its_surrogate_data_in_the_shape_of_the_victims(
    surrogate_run: FinishedRun, given_to: Callable[..., Context]
) -> None:
    """Without labels, whatever it has of the victim's images; 3x32x32 pieces of photographs are 1x8x8 to it."""
    kept = surrogate_tensors(surrogate_run)["train.x"]
    assert (kept.dtype, kept.shape) == (torch.uint8, (PHOTOS, 3, 32, 32))
    x = given_to().surrogate("photos")
    assert x.shape == (PHOTOS, *blobs().train.shape)
    assert torch.equal(x[:100], resized(kept[:100].float() / 255, (1, 8, 8)))
    whole = given_to(subset=DataSubset())
    assert len(whole.data) == 96
    assert torch.equal(whole.surrogate("photos")[:100], x[:100])


def test_an_attack_does_not_get_surrogate_data_that_it_did_not_name(given_to: Callable[..., Context]) -> None:
    """Nor the data set of the victim, though its stage is at hand."""
    ctx = given_to()
    for name in ("blobs", "digits", "photo"):
        with pytest.raises(
            KdbenchError, match=rf"^The surrogate data set '{name}' must be named by the attack's surrogate_datasets"
        ):
            ctx.surrogate(name)
    with pytest.raises(KdbenchError, match=r"'photos' must be named"):
        given_to(surrogates=()).surrogate("photos")


def test_by_default_there_is_no_surrogate_data(given_to: Callable[..., Context]) -> None:
    ctx = given_to()
    plain = Context(ctx.data, ctx.recipe, ctx.device, ctx.seed, ctx.new_student, ctx.generator)
    with pytest.raises(KdbenchError, match=r"'photos' must be named by the attack's surrogate_datasets\(\)"):
        plain.surrogate("photos")
    assert Looking().surrogate_datasets() == ()
