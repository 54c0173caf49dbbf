"""Sweeps: what a suite file runs with them."""

import re
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdbench.api import Recipe
from kdbench.defenses.nasty import Nasty
from kdbench.engine.plan import Plan
from kdbench.game.fields import build
from kdbench.runs.request import Request
from kdbench.suites import reader as suites
from kdbench.suites.methods import with_undefended
from kdbench.suites.sweeps import Sweep, spread
from suite_files import GOOD, OMEGA, POINTS, Json, complaint, names, read, sweep

# What a sweep runs


def test_a_swept_method_is_run_with_each_value_in_its_place(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"nasty", "stingy"]')
    suite, before = read(tmp_path, text + OMEGA), read(tmp_path, text)
    none, mild, strong, stingy = suite.defenses
    assert [mild.name, strong.name] == POINTS
    assert [mild.method, strong.method] == ["nasty", "nasty"]
    assert [mild.instance, strong.instance] == [Nasty(omega=0.1), Nasty(omega=1.0)]
    assert (none, stingy) == (before.defenses[0], before.defenses[2])
    assert (suite.attacks, suite.baselines, suite.dataset) == (before.attacks, before.baselines, before.dataset)


@pytest.mark.parametrize(
    ("method", "field", "value", "name", "kept"),
    [
        ("kd", "alpha", 0.5, "kd+alpha-0.5", 0.5),
        ("kd", "alpha", 1, "kd+alpha-1", 1.0),
        ("kd", "temperature", 20.0, "kd+temperature-20", 20.0),
        ("kd", "temperature", 1e-5, "kd+temperature-1e-05", 1e-5),
        ("kd", "queries", "once", "kd+queries-once", "once"),
        ("knockoff", "surrogate", "fashion-mnist", "knockoff+surrogate-fashion-mnist", "fashion-mnist"),
        ("assistant-kd", "chain", ["mini-8", "mini-16"], "assistant-kd+chain-2", ("mini-8", "mini-16")),
        ("assistant-kd", "chain", [], "assistant-kd+chain-0", ()),
    ],
)
def test_a_name_says_the_field_and_the_value_or_how_long_a_list_is(
    tmp_path: Path, method: str, field: str, value: Any, name: str, kept: Any
) -> None:
    text = GOOD.replace('"kd"', f'"{method}"') + sweep(f'"attack.{method}.{field}"', repr([value]))
    [attack] = read(tmp_path, text).attacks
    assert (attack.name, attack.method) == (name, method)
    assert vars(attack.instance)[field] == kept


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(VALUES)
def test_whatever_the_value_the_name_of_a_point_is_one(value: Any) -> None:
    [(ending, _)] = Sweep("attack.kd.temperature", (value,)).points()
    assert re.fullmatch(r"[\w.+-]+", f"kd{ending}")


def test_several_fields_change_together_and_the_first_names_the_point(tmp_path: Path) -> None:
    text = GOOD + sweep('["defense.nasty.omega", "defense.nasty.tau"]', "[[0.1, 2], [1, 9]]")
    _, mild, strong = read(tmp_path, text).defenses
    assert [mild.name, strong.name] == POINTS
    assert [mild.instance, strong.instance] == [Nasty(omega=0.1, tau=2.0), Nasty(omega=1.0, tau=9.0)]


def test_two_sweeps_of_a_method_make_all_combinations(tmp_path: Path) -> None:
    suite = read(tmp_path, GOOD + OMEGA + sweep('"defense.nasty.tau"', "[2, 9]"))
    assert [(choice.name, choice.instance) for choice in suite.defenses[1:]] == [
        (f"nasty+omega-{omega:g}+tau-{tau:g}", Nasty(omega=omega, tau=tau))
        for omega in (0.1, 1.0)
        for tau in (2.0, 9.0)
    ]


def test_sweeps_of_two_methods_leave_each_other_alone(tmp_path: Path) -> None:
    suite = read(tmp_path, GOOD + OMEGA + sweep('"attack.kd.alpha"', "[0.1, 0.5, 0.9]"))
    assert [choice.name for choice in suite.defenses] == ["none", *POINTS]
    assert [choice.name for choice in suite.attacks] == ["kd+alpha-0.1", "kd+alpha-0.5", "kd+alpha-0.9"]


def test_a_list_is_one_value_of_one_field_and_a_point_of_several(tmp_path: Path) -> None:
    text = GOOD.replace('"kd"', '"assistant-kd"')
    one = read(tmp_path, text + sweep('"attack.assistant-kd.chain"', '[[], ["mini-8"]]'))
    assert [choice.instance.chain for choice in one.attacks] == [(), ("mini-8",)]
    paths = '["attack.assistant-kd.chain", "attack.assistant-kd.alpha"]'
    two = read(tmp_path, text + sweep(paths, '[[[], 0.5], [["mini-8"], 1]]'))
    assert [(c.name, c.instance.chain, c.instance.alpha) for c in two.attacks] == [
        ("assistant-kd+chain-0", (), 0.5),
        ("assistant-kd+chain-1", ("mini-8",), 1.0),
    ]


def test_a_baseline_is_swept_where_the_file_names_it(tmp_path: Path) -> None:
    text = 'baselines = ["label-smoothing", "hard-label"]\n' + GOOD
    suite = read(tmp_path, text + sweep('"attack.label-smoothing.smoothing"', "[0.1, 0.2]"))
    assert [choice.name for choice in suite.baselines] == [
        "label-smoothing+smoothing-0.1",
        "label-smoothing+smoothing-0.2",
        "hard-label",
    ]


def test_the_recipe_of_a_defense_can_be_swept_with_its_fields(tmp_path: Path) -> None:
    base = "[victim.recipe]\nepochs = 3\n[defense.nasty.recipe]\nbatch = 32\n"
    text = GOOD + base + sweep('["defense.nasty.omega", "defense.nasty.recipe.lr"]', "[[0.1, 0.5], [1, 2]]")
    _, mild, strong = read(tmp_path, text).defenses
    assert [mild.recipe, strong.recipe] == [Recipe(epochs=3, batch=32, lr=lr) for lr in (0.5, 2.0)]


def test_a_method_is_swept_under_a_name_of_its_own(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"mild"]') + '[defense.mild]\nmethod = "nasty"\ntau = 2\n'
    suite = read(tmp_path, text + sweep('"defense.mild.omega"', "[0.1]"))
    assert [(c.name, c.method, c.instance) for c in suite.defenses[1:]] == [
        ("mild+omega-0.1", "nasty", Nasty(omega=0.1, tau=2.0))
    ]


def test_points_share_no_table() -> None:
    tree: Json = {"defenses": ["nasty"], "defense": {"nasty": {"tau": 2.0, "recipe": {"epochs": 3}}}}
    sweeps = [Sweep("defense.nasty.recipe.lr", (0.1, 1.0)), Sweep("defense.nasty.recipe.batch", (8,))]
    assert set(spread(tree, sweeps).values()) == {"nasty"}
    assert [tree["defense"][name]["recipe"] for name in tree["defenses"]] == [
        {"epochs": 3, "lr": 0.1, "batch": 8},
        {"epochs": 3, "lr": 1.0, "batch": 8},
    ]
    assert tree["defense"]["nasty"] == {"tau": 2.0, "recipe": {"epochs": 3}}


def test_a_method_that_is_not_chosen_is_not_run_for_its_sweep(tmp_path: Path) -> None:
    assert names(tmp_path, GOOD + OMEGA, {"defenses": ["none", "stingy"]}) == ["none", "stingy"]
    waiting = GOOD + sweep('"defense.stingy.ratio"', "[0.1, 1]")
    assert names(tmp_path, waiting, {"defenses": ["none", "stingy"]}) == [
        "none",
        "stingy+ratio-0.1",
        "stingy+ratio-1",
    ]


def test_a_sweep_of_what_is_not_run_is_refused(tmp_path: Path) -> None:
    text = GOOD + OMEGA + sweep('"defense.stingy.ratio"', "[0.1, 1]")
    said = "the defense 'stingy' is swept but not run: name it among the defenses."
    assert complaint(tmp_path, text) == f"mine.toml, line 15: {said}"
    assert complaint(tmp_path, text, {"attacks": ["kd"]}) == f"mine.toml, line 15: {said}"
    anew = {"sweep": [{"vary": "defense.stingy.ratio", "values": [1]}]}
    assert complaint(tmp_path, GOOD + OMEGA, {**anew, "defenses": ["nasty"]}) == said
    said = "the attack 'scm' is swept but not run: name it among the attacks or baselines."
    assert said in complaint(tmp_path, GOOD + sweep('"attack.scm.temperature"', "[2]"))


def test_a_point_of_a_sweep_can_be_swept(tmp_path: Path) -> None:
    text = GOOD + OMEGA + sweep("""'defense."nasty+omega-1".tau'""", "[2]")
    assert names(tmp_path, text) == ["none", "nasty+omega-0.1", "nasty+omega-1+tau-2"]


def test_a_sweep_plans_what_its_points_written_out_would(plan: Callable[..., Plan]) -> None:
    """Stages, keys and cells: a sweep is a way of writing and nothing else."""
    vary = {
        "sweep": [{"vary": "defense.nasty.omega", "values": [0.1, 1]}, {"vary": "attack.kd.alpha", "values": [0.5]}]
    }
    written: Json = {
        "defenses": ["none", *POINTS, "stingy"],
        "attacks": ["kd+alpha-0.5", "partial-kd"],
        "defense": {point: {"method": "nasty", "omega": omega} for point, omega in zip(POINTS, (0.1, 1), strict=True)},
        "attack": {"kd+alpha-0.5": {"method": "kd", "alpha": 0.5}, "partial-kd": {"fraction": 0.5}},
    }
    swept, same = plan(vary), plan(written)
    assert {stage.title for stage in swept.stages.values() if stage.kind == "harden"} == {
        f"harden by {name}, seed 0" for name in POINTS
    }
    assert {cell.name: cell.keys for cell in same.cells} == {cell.name: cell.keys for cell in swept.cells}
    assert swept.stages.keys() == same.stages.keys()


@pytest.mark.parametrize("name", suites.shipped())
def test_every_shipped_sweep_is_run_at_all_its_points(name: str) -> None:
    suite = suites.load(name)
    tree = tomllib.loads((files("kdbench.benchmarks") / "suites" / f"{name}.toml").read_text(encoding="utf-8"))
    run = {"defense": suite.defenses, "attack": suite.attacks + suite.baselines}
    for table in tree.get("sweep", []):
        swept = build(Sweep, table, "sweep")
        kind, name = swept.method
        for ending, _ in swept.points():
            points = [c for c in run[kind] if c.name.startswith(f"{name}+") and f"{ending}+" in f"{c.name}+"]
            assert points, (name, ending)


# Sweeps and the command line


def test_a_defense_that_is_chosen_is_swept(tmp_path: Path) -> None:
    changes = Request(defense=["nasty"]).tree()
    assert names(tmp_path, GOOD + OMEGA, changes) == POINTS
    chosen = with_undefended(suites.load("omega-digits", Request(defense=["nasty"], attack=["kd"]).tree()))
    swept = suites.load("omega-digits")
    assert [c.name for c in chosen.defenses] == [c.name for c in swept.defenses]
    assert [c.name for c in chosen.attacks] == ["kd"]


def test_other_fields_of_a_swept_method_are_set_at_every_point(tmp_path: Path) -> None:
    changes = Request(changes=["defense.nasty.tau=9", "defense.nasty.recipe.lr=0.5"]).tree()
    for text in (GOOD + OMEGA, GOOD + "[defense.nasty]\ntau = 2\n" + OMEGA):
        suite = read(tmp_path, text, changes)
        assert [choice.instance for choice in suite.defenses[1:]] == [Nasty(omega=w, tau=9.0) for w in (0.1, 1.0)]
        assert [choice.recipe for choice in suite.defenses[1:]] == [Recipe(lr=0.5)] * 2


def test_the_command_line_can_sweep_and_stop_sweeping(tmp_path: Path) -> None:
    anew = Request(changes=['sweep=[{vary = "defense.nasty.tau", values = [2]}]']).tree()
    assert names(tmp_path, GOOD + OMEGA, anew) == ["none", "nasty+tau-2"]
    assert read(tmp_path, GOOD + OMEGA, Request(changes=["sweep=[]"]).tree()) == read(tmp_path, GOOD)
