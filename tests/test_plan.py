"""The plan: every stage once, cells and titles, access levels, skipped and bypassed cells, baselines."""

import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable

from kdbench.api import Access
from kdbench.engine.numerics import Numerics
from kdbench.engine.plan import Plan
from kdbench.engine.planner import make_plan
from kdbench.engine.specs import StealSpec
from kdbench.game.fields import plain
from kdbench.suites.suite import Suite
from runs import (
    ONE_CELL,
    cell,
)


def by_kind(plan: Plan) -> Counter[str]:
    return Counter(stage.kind for stage in plan.stages.values())


def test_every_stage_is_planned_once_however_many_cells_need_it(plan: Callable[..., Plan]) -> None:
    """By hand: 3 defenses x (hard-label, kd, partial-kd), and 2 baselines x (all data, half of it)."""
    one = plan()
    assert len(one.cells) == 3 * 3 + 2 * 2
    assert by_kind(one) == {"data": 1, "train": 1, "harden": 1, "steal": 9 + 4, "evaluate": 9 + 4 + 3}
    two = plan({"seeds": 2})
    assert len(two.cells) == 2 * len(one.cells)
    assert by_kind(two) == {"data": 1, "train": 2, "harden": 2, "steal": 26, "evaluate": 32}
    students = plan({"student.networks": ["mini-8", "mini-16"]})
    assert by_kind(students) == {"data": 1, "train": 1, "harden": 1, "steal": 26, "evaluate": 26 + 3}
    assert by_kind(plan(ONE_CELL)) == {"data": 1, "train": 1, "steal": 1, "evaluate": 2}


def test_a_method_that_is_a_baseline_and_an_attack_is_run_once(plan: Callable[..., Plan]) -> None:
    both = plan({"attacks": ["kd", "partial-kd", "hard-label", "cross-entropy"]})
    assert both.stages.keys() == plan().stages.keys()
    assert {c.name for c in both.cells} == {c.name for c in plan().cells}


def test_stages_come_after_what_they_build_on_and_name_exactly_that(plan: Callable[..., Plan]) -> None:
    before: set[str] = set()
    for key, stage in plan({"seeds": 2}).stages.items():
        assert set(stage.inputs) <= before
        named = re.findall(r"\b(?:data|train|harden|steal)/[0-9a-f]{32}\b", json.dumps(plain(stage.spec)))
        assert set(named) == set(stage.inputs)
        before.add(key)


def test_a_plan_takes_less_than_2_KiB_a_cell(tiny: Callable[..., Suite]) -> None:
    """A cell's stages included; what is imported and cached once is no cell's."""
    suite = tiny({"seeds": 60})
    make_plan(suite, Numerics(), "d")
    tracemalloc.start()
    plan = make_plan(suite, Numerics(), "d")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2048 * len(plan.cells)


def test_stages_have_titles_of_their_own(plan: Callable[..., Plan]) -> None:
    """Two seeds, two students, baselines on three subsets of the data, two of which have the same size."""
    changes = {
        "seeds": [3, 5],
        "student.networks": ["mini-8", "mini-16"],
        "attacks": ["kd", "one-half", "other-half"],
        "attack.one-half": {"method": "partial-kd", "fraction": 0.5},
        "attack.other-half": {"method": "partial-kd", "fraction": 0.5, "subset_seed": 1},
    }
    stages = plan(changes).stages.values()
    assert len({stage.title for stage in stages}) == len(stages)


def test_cells_have_names_of_their_own(plan: Callable[..., Plan]) -> None:
    cells = plan({"seeds": [3, 5], "student.networks": ["mini-8", "mini-16"]}).cells
    assert len({c.name for c in cells}) == len(cells) == 4 * 13


def test_none_and_a_defense_that_only_serves_deploy_the_victim_itself(plan: Callable[..., Plan]) -> None:
    found = plan()
    none, stingy, nasty = (cell(found, defense, "kd").stages for defense in ("none", "stingy", "nasty"))
    assert none["harden"] == none["train"] == stingy["harden"]
    assert nasty["harden"] != none["harden"]
    assert none["steal"] != stingy["steal"]
    assert none["evaluate_victim"] != stingy["evaluate_victim"]


def test_an_attack_that_needs_more_than_is_granted_is_skipped_with_the_reason(plan: Callable[..., Plan]) -> None:
    found = plan({"scenario.access": "label", "attacks": ["kd", "deep-inversion"]})
    for defense in ("none", "nasty", "stingy"):
        assert cell(found, defense, "kd").skipped == "'kd' needs topk; the suite grants label"
        assert (
            cell(found, defense, "deep-inversion").skipped == "'deep-inversion' needs weights; the suite grants label"
        )
        assert cell(found, defense, "kd").stages == {}
        assert cell(found, defense, "hard-label").skipped == ""
    assert {s.title for s in found.stages.values() if s.kind == "steal" and "hard-label" in s.title} == {
        f"hard-label from {defense}, seed 0" for defense in ("none", "nasty", "stingy")
    }
    assert not any("kd" in stage.title or "deep-inversion" in stage.title for stage in found.stages.values())


def test_weights_are_granted_only_to_those_who_need_them(plan: Callable[..., Plan]) -> None:
    found = plan({"scenario.access": "weights", "attacks": ["kd", "deep-inversion"]})
    assert cell(found, "none", "kd").scenario.access is Access.PROBS
    assert cell(found, "none", "deep-inversion").scenario.access is Access.WEIGHTS
    probs = plan({"scenario.access": "probs", "attacks": ["kd"]})
    assert cell(found, "nasty", "kd").stages == cell(probs, "nasty", "kd").stages


def test_a_defense_that_only_serves_is_bypassed_by_an_attacker_with_the_weights(plan: Callable[..., Plan]) -> None:
    found = plan({"scenario.access": "weights", "attacks": ["kd", "deep-inversion"]})
    bypassed = {(c.defense.name, c.attack.name) for c in found.cells if c.bypassed and c.defense}
    assert bypassed == {("stingy", "deep-inversion")}
    assert cell(found, "stingy", "deep-inversion").stages  # it is run all the same


def test_baselines_are_trained_on_the_subsets_that_attacks_use(plan: Callable[..., Plan]) -> None:
    found = plan()
    fractions = {c.subset.fraction for c in found.cells if c.defense is None}
    assert fractions == {1.0, 0.5}
    partial, baseline = cell(found, "none", "partial-kd"), cell(found, None, "cross-entropy", 0.5)
    assert partial.subset == baseline.subset
    specs = [found.stages[c.stages["steal"]].spec for c in (partial, baseline)]
    assert all(isinstance(spec, StealSpec) and spec.attack.subset == partial.subset for spec in specs)
    assert specs[0].seed == specs[1].seed  # type: ignore[union-attr]


def test_an_attack_without_data_gets_no_baseline_without_data(plan: Callable[..., Plan]) -> None:
    found = plan({"scenario.access": "weights", "attacks": ["deep-inversion"]})
    assert cell(found, "none", "deep-inversion").subset.fraction == 0
    assert {c.subset.fraction for c in found.cells if c.defense is None} == {1.0}


def test_an_attacker_without_images_runs_only_what_needs_none(plan: Callable[..., Plan]) -> None:
    found = plan({"scenario.access": "weights", "scenario.data": 0, "attacks": ["kd", "deep-inversion"]})
    assert cell(found, "none", "kd").skipped == "'kd' needs images of its own; the suite grants none"
    assert cell(found, "none", "deep-inversion").skipped == ""
    assert not [c for c in found.cells if c.defense is None]
