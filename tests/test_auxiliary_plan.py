"""The auxiliary stage as planned: once for each deployed model, with a key that says what it is made by."""

from collections import Counter
from collections.abc import Callable

import pytest
from auxiliary_runs import MISINFORMATION, REDIRECTION, WITH_AUXILIARY

from kdbench.engine.plan import STAGES_OF_CELL, Plan, PlannedCell, Stage
from kdbench.engine.specs import AuxiliarySpec, EvaluateSpec, StealSpec
from runs import Json, cell


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
