"""Fields: plain values become typed ones, or one sentence says what is wrong."""

import json
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdbench import registry
from kdbench.api import Access, Count, DataSubset, KdbenchError, Recipe, Scenario
from kdbench.errors import unknown
from kdbench.evaluation.adversarial import Robustness
from kdbench.game.fields import Checked, build, hints, plain


class Mood(Enum):
    CALM = "calm"
    WILD = "wild"


@dataclass(frozen=True)
class Sample(Checked):
    """Fields of many types, one without a default."""

    name: str
    ratio: float = 0.5
    moods: tuple[Mood, ...] = ()
    mood: Mood | None = None
    size: Count | tuple[Count, ...] = 1
    subset: DataSubset = field(default_factory=DataSubset)
    level: Literal["low", "high"] = "low"


def sentence(cls: type, values: dict[str, Any]) -> str:
    with pytest.raises(KdbenchError) as caught:
        build(cls, values, "here")
    return str(caught.value)


# The sentence


@pytest.mark.parametrize(
    ("cls", "field", "value", "expected"),
    [
        (Recipe, "lr", -1, "here.lr must be greater than 0, not -1."),
        (Recipe, "lr", "fast", "here.lr must be a valid number, not 'fast'."),
        (Recipe, "momentum", 1.5, "here.momentum must be less than or equal to 1, not 1.5."),
        (Recipe, "epochs", 0, "here.epochs must be greater than or equal to 1, not 0."),
        (Recipe, "optimizer", "sgdd", "here.optimizer must be 'sgd' or 'adam', not 'sgdd'."),
        (Recipe, "milestones", [3, -2], "here.milestones[1] must be greater than or equal to 0, not [3, -2]."),
        (Recipe, "milestones", 3, "here.milestones must be a valid array, not 3."),
        (Recipe, "flip", "yes", "here.flip must be a valid boolean, not 'yes'."),
        (
            Scenario,
            "access",
            "prob",
            "here.access must be one of nothing, label, topk, probs, weights, not 'prob'.",
        ),
        (Scenario, "budget", "much", "here.budget must be a valid integer, not 'much'."),
        (Robustness, "cw_inset", 0.5, "here.cw_inset must be less than 0.5, not 0.5."),
        (Sample, "size", "big", "here.size must be a valid integer or a valid array, not 'big'."),
        (Sample, "size", [1, 0], "here.size[1] must be greater than or equal to 1, not [1, 0]."),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_is_allowed(
    cls: type, field: str, value: object, expected: str
) -> None:
    assert sentence(cls, {field: value}) == expected


@pytest.mark.parametrize(("field", "value"), [("mood", "angry"), ("moods", ["calm", "angry"])])
def test_an_error_names_the_values_of_an_enum_also_inside_other_types(field: str, value: object) -> None:
    said = sentence(Sample, {"name": "x", field: value})
    assert said.startswith(f"here.{field}")
    assert "'calm' or 'wild'" in said
    assert said.endswith(f"not {value!r}.")


def test_a_bad_value_is_refused_by_the_constructor_too() -> None:
    with pytest.raises(KdbenchError, match=r"^Recipe\.lr must be greater than 0, not -1\.$"):
        Recipe(lr=-1)
    with pytest.raises(KdbenchError, match=r"^Recipe\.optimizer must be 'sgd' or 'adam', not 'sgdd'\.$"):
        Recipe(optimizer="sgdd")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay", "clip"])
def test_what_is_not_finite_is_refused(field: str, value: float) -> None:
    expected = rf"\.{field} must be a finite number, not {value}\.$"
    with pytest.raises(KdbenchError, match=expected):
        build(Recipe, {field: value}, "here")
    with pytest.raises(KdbenchError, match=expected):
        Recipe(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("lr", True), ("lr", "0.1"), ("epochs", True), ("epochs", 2.0), ("epochs", "2"), ("flip", 1)]
)
def test_nothing_is_turned_into_another_type(field: str, value: object) -> None:
    with pytest.raises(KdbenchError, match=rf"\.{field} must be a valid "):
        build(Recipe, {field: value}, "here")
    with pytest.raises(KdbenchError, match=rf"\.{field} must be a valid "):
        Recipe(**{field: value})  # type: ignore[arg-type]


def test_an_unknown_field_is_named_with_the_nearest_one() -> None:
    said = sentence(Recipe, {"momentun": 0.9})
    assert said.startswith("There is no field 'momentun' in here. Did you mean 'momentum'? Known: batch, clip, ")


def test_a_missing_field_is_named() -> None:
    assert sentence(Sample, {}) == "here: the field 'name' is missing."


def test_an_error_says_which_field_is_at_fault() -> None:
    for values in ({"lr": -1}, {"lr": "x"}, {"lr": 0.1, "lrr": 1}):
        with pytest.raises(KdbenchError) as caught:
            build(Recipe, values, "here")
        assert caught.value.field == list(values)[-1]


# Equal values


def test_a_whole_number_for_a_float_becomes_one() -> None:
    for recipe in (Recipe(lr=1, momentum=0), build(Recipe, {"lr": 1, "momentum": 0}, "here")):
        assert recipe == Recipe(lr=1.0, momentum=0.0)
        assert json.dumps(plain(recipe)) == json.dumps(plain(Recipe(lr=1.0, momentum=0.0)))


def test_a_list_becomes_a_tuple() -> None:
    recipe = build(Recipe, {"milestones": [3, 5]}, "here")
    assert recipe.milestones == (3, 5)
    assert hash(recipe) == hash(Recipe(milestones=(3, 5)))


def test_no_values_are_the_defaults() -> None:
    assert build(Recipe, {}, "here") == Recipe()
    assert build(Scenario, {}, "here") == Scenario()


# There and back


def floats(**bounds: Any) -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False, **bounds)


POSITIVE = {"min_value": 0.0, "exclude_min": True}
RECIPES = st.builds(
    Recipe,
    epochs=st.integers(1),
    batch=st.integers(1),
    optimizer=st.sampled_from(["sgd", "adam"]),
    lr=floats(**POSITIVE),
    momentum=floats(min_value=0, max_value=1, exclude_min=True),  # nesterov needs some
    nesterov=st.booleans(),
    weight_decay=floats(min_value=0),
    schedule=st.sampled_from(["steps", "cosine"]),
    milestones=st.lists(st.integers(0), max_size=4).map(tuple),
    gamma=floats(**POSITIVE),
    crop=st.integers(0),
    flip=st.booleans(),
    clip=floats(min_value=0),
)
SCENARIOS = st.builds(
    Scenario,
    name=st.text(max_size=5),
    access=st.sampled_from(Access),
    topk=st.integers(1),
    budget=st.none() | st.integers(1),
    data=floats(min_value=0, max_value=1),
    labels=st.booleans(),
)


@given(value=RECIPES | SCENARIOS)
def test_a_value_survives_the_trip_through_json(value: Recipe | Scenario) -> None:
    assert build(type(value), json.loads(json.dumps(plain(value))), "here") == value


@pytest.mark.parametrize("kind", ["defense", "attack", "dataset"])
def test_the_defaults_of_everything_registered_survive_the_trip_through_json(kind: str) -> None:
    for name in registry.names(kind):
        cls = registry.find(kind, name).load()
        assert build(cls, json.loads(json.dumps(plain(cls()))), name) == cls()


def test_a_value_with_parts_survives_the_trip_through_json() -> None:
    sample = Sample(
        "x", moods=(Mood.WILD, Mood.CALM), mood=Mood.CALM, size=(2, 3), subset=DataSubset(0.5, 7), level="high"
    )
    tree = plain(sample)
    assert tree == {
        "name": "x",
        "ratio": 0.5,
        "moods": ["wild", "calm"],
        "mood": "calm",
        "size": [2, 3],
        "subset": {"fraction": 0.5, "seed": 7},
        "level": "high",
    }
    assert build(Sample, json.loads(json.dumps(tree)), "here") == sample


def test_access_levels_are_written_by_name() -> None:
    assert plain(Scenario(access=Access.TOPK))["access"] == "topk"
    assert build(Scenario, {"access": "topk"}, "here").access is Access.TOPK


@pytest.mark.parametrize("value", [2, 2.0, True, None, ["topk"]])
def test_access_levels_are_not_written_by_number(value: object) -> None:
    assert sentence(Scenario, {"access": value}).startswith("here.access must be one of nothing, label, ")


def test_what_is_plain_already_stays_as_it_is() -> None:
    tree = {"a": [1, 2.5, None, True, {"b": "c"}]}
    assert plain(tree) == tree
    assert plain({1: (Mood.CALM,)}) == {"1": ["calm"]}


def test_hints_are_in_the_order_of_the_fields() -> None:
    assert list(hints(Recipe)) == [f.name for f in fields(Recipe)]


# Names that do not exist


def test_a_name_that_does_not_exist_is_told_with_the_nearest_and_all_that_do() -> None:
    said = "There is no defense 'nastty'. Did you mean 'nasty'? Known: nasty, none."
    assert str(unknown("defense", "nastty", ["none", "nasty"])) == said


def test_a_name_that_is_like_none_gets_no_guess() -> None:
    assert str(unknown("defense", "xyz", ["nasty"], "here")) == "There is no defense 'xyz' in here. Known: nasty."
    assert str(unknown("defense", "xyz", [])) == "There is no defense 'xyz'. Known: nothing."
