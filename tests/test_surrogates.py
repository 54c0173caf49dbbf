"""Surrogate data: which attack gets which, in what shape, and what of it a result depends on."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stage_runs import Rerun, with_attack
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
from kdbench.zoo.photos import Photos
from runs import ONE_CELL, FinishedRun, Json, RecordedProgress, cell, numbers, run
from suite_files import GOOD, complaint, read

PHOTOS = 20_000
WITH_SURROGATES: Json = {**ONE_CELL, "attacks": ["knockoff"], "attack.knockoff.queries": 64}
KNOCKOFF = GOOD.replace('"kd"', '"knockoff"')


# Images in another shape


def test_images_of_the_right_shape_stay_as_they_are() -> None:
    x = torch.rand(5, 3, 6, 7)
    assert torch.equal(resized(x, (3, 6, 7)), x)
    assert torch.equal(resized(x[:, :2], (2, 6, 7)), x[:, :2])


def test_grey_images_become_colours_that_are_grey() -> None:
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(resized(x, (3, 8, 8)), torch.cat([x, x, x], dim=1))


def test_colours_become_their_luminance() -> None:
    """ITU-R BT.601: red 0.299, green 0.587, blue 0.114."""
    pure = torch.eye(4, 3)[:, :, None, None].expand(-1, -1, 2, 2)
    pure = torch.cat([pure, torch.ones(1, 3, 2, 2)])
    expected = torch.tensor([0.299, 0.587, 0.114, 0.0, 1.0]).reshape(5, 1, 1, 1).expand(-1, 1, 2, 2)
    torch.testing.assert_close(resized(pure, (1, 2, 2)), expected)


def test_there_and_back_grey_stays_grey() -> None:
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(resized(resized(x, (3, 8, 8)), (1, 8, 8)), x)


def test_a_fine_pattern_becomes_grey_and_no_coarse_one() -> None:
    """A chessboard of single pixels at half the size: without a filter it would come out black, white or striped."""
    chess = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().reshape(1, 1, 16, 16)
    small = resized(chess, (1, 8, 8))
    assert (small - 0.5).abs().max() < 0.02


@given(
    st.sampled_from([(1, 1), (1, 3), (3, 1), (3, 3), (4, 4)]),
    st.tuples(*[st.integers(1, 20)] * 4),
    st.sampled_from([0.0, 1.0, 0.3]),
)
def test_whatever_the_shape_images_are_of_it_and_in_range(
    channels: tuple[int, int], sides: tuple[int, int, int, int], level: float
) -> None:
    """An image of one colour keeps it; none leaves [0,1]."""
    before, shape = (channels[0], *sides[:2]), (channels[1], *sides[2:])
    even, wild = torch.full((2, *before), level), torch.rand(2, *before).round()
    x = resized(torch.cat([even, wild]), shape)
    assert x.shape == (4, *shape)
    assert x.is_contiguous()
    assert x.amin() >= 0
    assert x.amax() <= 1
    torch.testing.assert_close(x[:2], torch.full((2, *shape), level), atol=1e-5, rtol=0)


def test_no_images_are_no_images_in_any_shape() -> None:
    assert resized(torch.rand(0, 3, 32, 32), (1, 8, 8)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(("own", "asked"), [(2, 3), (3, 2), (1, 2), (4, 3), (4, 1)])
def test_channels_of_which_nothing_is_known_are_refused(own: int, asked: int) -> None:
    said = rf"^images of {own} channels cannot be made to have {asked}; 1 and 3 can\.$"
    with pytest.raises(KdbenchError, match=said):
        resized(torch.rand(2, own, 8, 8), (asked, 8, 8))


# What a file says


def test_a_suite_has_each_surrogate_data_set_of_its_attacks_once(tmp_path: Path) -> None:
    text = GOOD.replace('"kd"', '"knockoff", "adaptive-knockoff", "kd", "digital"') + (
        '[attack.adaptive-knockoff]\nmethod = "knockoff"\npolicy = "adaptive"\n'
        '[attack.digital]\nmethod = "knockoff"\nsurrogate = "digits"\n'
    )
    suite = read(tmp_path, text)
    assert [(c.name, c.method, c.instance) for c in suite.surrogates if c.name == "photos"] == [
        ("photos", "photos", Photos())
    ]
    assert sorted(choice.name for choice in suite.surrogates) == ["digits", "photos"]
    assert read(tmp_path, GOOD).surrogates == ()
    assert read(tmp_path, text, {"attacks": ["kd"]}).surrogates == ()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[attack.knockoff]\nsurrogate = "blobs"\n', 10, "attack.knockoff draws on 'blobs', the data set under "),
        (
            '[attack.knockoff]\nsurrogate = "photoz"\n',
            10,
            "There is no dataset 'photoz'. Did you mean 'photos'? Known: ",
        ),
        ('[attack.knockoff]\nsurrogate = ""\n', 10, "There is no dataset ''. Known: "),
    ],
)
def test_surrogate_data_that_cannot_be_is_named_with_the_line_of_the_attack(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    assert complaint(tmp_path, KNOCKOFF + text).startswith(f"mine.toml, line {line}: {said}")


def test_the_data_set_of_the_victim_is_no_surrogate_data_however_it_is_written(tmp_path: Path) -> None:
    text = KNOCKOFF.replace('"blobs"', '{ name = "blobs", noise = 1 }') + '[attack.knockoff]\nsurrogate = "blobs"\n'
    assert "draws on 'blobs'" in complaint(tmp_path, text)
    assert "draws on 'photos'" in complaint(tmp_path, KNOCKOFF, {"dataset": "photos"})


@pytest.mark.parametrize(("own", "surrogate"), [("cifar10", "cifar10-jpeg"), ("cifar10-jpeg", "cifar10")])
def test_surrogate_data_of_the_same_images_in_another_form_is_refused(tmp_path: Path, own: str, surrogate: str) -> None:
    text = KNOCKOFF.replace('"blobs"', f'"{own}"') + f'[attack.knockoff]\nsurrogate = "{surrogate}"\n'
    said = f"attack.knockoff draws on '{surrogate}', which holds the images of '{own}', the data set under attack."
    assert complaint(tmp_path, text) == f"mine.toml, line 10: {said}"
    assert [choice.name for choice in read(tmp_path, text, {"attack.knockoff.surrogate": "cifar100"}).surrogates] == [
        "cifar100"
    ]


def test_surrogate_data_from_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    said = complaint(tmp_path, KNOCKOFF, {"attack.knockoff.surrogate": "photoz"})
    assert said.startswith("There is no dataset 'photoz'. Did you mean 'photos'? ")


@pytest.mark.parametrize("other", ["", "[attack.partial-kd]\nfraction = 0.1\n"])
def test_default_surrogate_data_that_cannot_be_is_blamed_on_the_line_that_names_its_attack(
    tmp_path: Path, other: str
) -> None:
    said = complaint(tmp_path, KNOCKOFF.replace('"blobs"', '"photos"') + other)
    assert said.startswith("mine.toml, line 2: attack.knockoff draws on 'photos'")


def test_surrogate_data_of_an_attack_that_does_not_run_must_be_right_all_the_same(tmp_path: Path) -> None:
    assert "photoz" in complaint(tmp_path, GOOD + '[attack.knockoff]\nsurrogate = "photoz"\n')


def test_surrogate_data_that_lacks_its_argument_is_found_before_any_training(tmp_path: Path) -> None:
    assert "imagefolder:PATH" in complaint(tmp_path, KNOCKOFF + '[attack.knockoff]\nsurrogate = "imagefolder"\n')


@dataclass(frozen=True)
class Stamped(Photos):
    """Photos whose files are not the same for everybody."""

    def fingerprint(self, folder: Path) -> str:
        return f"{folder.name}-{self.images}"


def test_a_suite_is_stamped_with_the_files_of_all_its_data_sets(tmp_path: Path) -> None:
    suite = read(tmp_path, KNOCKOFF)
    own, other = (replace(one, instance=Stamped(images=n)) for one, n in ((suite.dataset, 3), (suite.surrogates[0], 5)))
    suite = replace(suite, dataset=own, surrogates=(other,))
    stamped = suite.stamped(tmp_path / "here")
    assert (stamped.dataset.files, [one.files for one in stamped.surrogates]) == ("here-3", ["here-5"])
    assert replace(stamped, dataset=own, surrogates=(other,)) == suite
    moved = suite.stamped(tmp_path / "there")
    for before, after in ((stamped.dataset, moved.dataset), (stamped.surrogates[0], moved.surrogates[0])):
        assert data_stage(before).key != data_stage(after).key
    assert [one.files for one in read(tmp_path, KNOCKOFF).stamped(tmp_path).surrogates] == [""]


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


@pytest.fixture(scope="module")
def finished_run(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One cell of an attack that uses photographs; no test changes this folder."""
    folder, progress_display = tmp_path_factory.mktemp("with_surrogates"), RecordedProgress()
    return FinishedRun(folder, run(tiny(WITH_SURROGATES), folder, progress_display), progress_display)


def test_an_attack_with_surrogate_data_ends_well(finished_run: FinishedRun) -> None:
    assert finished_run.progress_display.problems == {}
    [(name, found)] = finished_run.cells.items()
    assert name == "none--knockoff--mini-8--seed0"
    assert (found.status, found.metrics["queries"], found.numbers["steal.asked"]) == (Status.DONE, 64, 64)
    assert found.attack.fields["surrogate"] == "photos"
    assert sorted(finished_run.progress_display.titles) == sorted(
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
    finished_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    again = run(tiny({**WITH_SURROGATES, "attack.knockoff.queries": 32}), finished_run.copy(tmp_path), progress_display)
    assert sorted(progress_display.titles) == ["evaluate knockoff on none, seed 0", "knockoff from none, seed 0"]
    assert [one.metrics["queries"] for one in again.values()] == [32]
    progress_display = RecordedProgress()
    forced = run(tiny(WITH_SURROGATES), tmp_path / "forced", progress_display, store=tmp_path / "store", force=True)
    assert not [title for title in progress_display.titles if title.startswith("read")]
    assert numbers(forced) == numbers(finished_run.cells)


def test_surrogate_data_whose_files_are_missing_is_said_before_any_training(
    finished_run: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    folder = finished_run.copy(tmp_path)
    with pytest.raises(KdbenchError, match="cifar-10"):
        run(
            tiny({**WITH_SURROGATES, "attack.knockoff.surrogate": "cifar10"}),
            folder,
            progress_display,
            data_dir=tmp_path / "empty",
        )
    assert progress_display.titles == ["read cifar10"]
    assert Store(folder / "store").finished() == finished_run.store.finished()


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
def given_to(finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Context]:
    """What an attack gets whose run is like the one above, but for some parts of its specification."""
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: Looking if name == "looking" else load(kind, name))
    [attack_run] = [stage for stage in finished_run.progress_display.finished if stage.kind == "steal"]

    rerun = Rerun(finished_run.store, tmp_path)

    def rerun_with(**changes: Any) -> Context:
        Looking.found.contexts.clear()
        spec = with_attack(attack_run.spec, "looking")
        rerun.run(replace(spec, attack=replace(spec.attack, **changes)))
        [context] = Looking.found.contexts
        return context

    return rerun_with


def surrogate_tensors(finished_run: FinishedRun) -> Mapping[str, Tensor]:
    """The tensors of the surrogate data as they lie in the store."""
    [photos] = [stage.key for stage in finished_run.progress_display.finished if stage.title == "read photos"]
    return load_tensors(finished_run.store.path(photos) / TENSORS)


def test_an_attacker_gets_the_training_images_of_its_surrogate_data_in_the_shape_of_the_victims(
    finished_run: FinishedRun, given_to: Callable[..., Context]
) -> None:
    """Without labels, whatever it has of the victim's images; 3x32x32 pieces of photographs are 1x8x8 to it."""
    kept = surrogate_tensors(finished_run)["train.x"]
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
