"""A suite file: what it says, and what the command line changes in it."""

import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from kdbench import registry
from kdbench.api import Access, Recipe, Scenario
from kdbench.attacks.kd import KD
from kdbench.defenses.nasty import Nasty
from kdbench.defenses.none import NoDefense
from kdbench.evaluation.adversarial import Robustness
from kdbench.suites import reader as suites
from kdbench.suites.methods import with_undefended
from suite_files import GOOD, HEAD, NETWORKS, read

# What a file says


@pytest.mark.parametrize("name", suites.shipped())
def test_every_shipped_suite_loads_and_runs_what_it_says(name: str) -> None:
    suite = suites.load(name)
    tree = tomllib.loads((files("kdbench.benchmarks") / "suites" / f"{name}.toml").read_text(encoding="utf-8"))
    assert suite.name == name
    assert suite.title
    assert len(suite.seeds) >= 3
    assert list(dict.fromkeys(choice.name.partition("+")[0] for choice in suite.defenses)) == tree["defenses"]
    assert list(dict.fromkeys(choice.name.partition("+")[0] for choice in suite.attacks)) == tree["attacks"]
    # An attack by labels alone needs images to ask about, which no attacker of some suites owns.
    by_labels = {"hard-label"} if any(choice.instance.data_subset().fraction for choice in suite.attacks) else set()
    assert {"cross-entropy", "label-smoothing"} | by_labels <= {choice.name for choice in suite.baselines}
    assert any(choice.instance.is_reference for choice in suite.defenses)


def test_every_built_in_method_is_run_by_a_shipped_suite() -> None:
    shipped = [suites.load(name) for name in suites.shipped()]
    run = {
        "defense": {choice.method for suite in shipped for choice in suite.defenses},
        "attack": {choice.method for suite in shipped for choice in (*suite.attacks, *suite.baselines)},
    }
    for kind, names in run.items():
        built_in = {entry.name for entry in registry.entries(kind) if entry.origin.startswith("kdbench ")}
        assert names == built_in


def test_a_file_becomes_typed_values(tmp_path: Path) -> None:
    text = f"""\
title = "Mine"
seeds = [3, 5]
tolerance = 0.1
{HEAD}
[victim]
network = "mini-16"

[victim.recipe]
epochs = 2
milestones = [1]

[student]
network = "mini-8"

[student.recipe]
lr = 1

[scenario]
access = "topk"
topk = 2
budget = 100

[robustness]
level = "none"

[defense.nasty]
omega = 0.5
"""
    suite = read(tmp_path, text)
    assert (suite.name, suite.title, suite.seeds, suite.tolerance) == ("mine", "Mine", (3, 5), 0.1)
    assert (suite.victim, suite.students) == ("mini-16", ("mini-8",))
    assert suite.victim_recipe == Recipe(epochs=2, milestones=(1,))
    assert suite.student_recipes == {"mini-8": Recipe(lr=1.0)}
    assert suite.scenario == Scenario(access=Access.TOPK, topk=2, budget=100)
    assert suite.robustness == Robustness(level="none")
    assert suite.dataset.name == "blobs"
    assert [choice.instance for choice in suite.defenses] == [NoDefense(), Nasty(omega=0.5)]
    assert suite.defenses[1].fields == {"tau": 4.0, "omega": 0.5, "clip": 1.0}
    assert [choice.instance for choice in suite.attacks] == [KD()]


def test_what_a_file_does_not_say_has_defaults(tmp_path: Path) -> None:
    suite = read(tmp_path, '[victim]\nnetwork = "mini-8"\n[student]\nnetwork = "mini-8"\n')
    assert suite.seeds == (0, 1, 2)
    assert suite.dataset.name == "digits"
    assert [choice.name for choice in suite.defenses] == ["none"]
    assert [choice.name for choice in suite.attacks] == ["kd"]
    assert [choice.name for choice in suite.baselines] == ["cross-entropy", "label-smoothing", "hard-label"]
    assert (suite.scenario, suite.robustness) == (Scenario(), Robustness())
    assert suite.victim_recipe == suite.student_recipes["mini-8"] == Recipe()


def test_fields_of_a_data_set_stand_in_its_table(tmp_path: Path) -> None:
    suite = read(tmp_path, NETWORKS + '[dataset]\nname = "blobs"\nnoise = 1\n')
    assert suite.dataset.fields == {"images": 96, "noise": 1.0, "seed": 0}


def test_one_method_can_be_run_under_several_names(tmp_path: Path) -> None:
    text = f"""\
defenses = ["none", "nasty", "nasty-0.5", "nasty+mild"]
attacks = ["kd", "hot"]
{NETWORKS}
[defense."nasty-0.5"]
method = "nasty"
omega = 0.5

[defense."nasty+mild"]
method = "nasty"
omega = 0.001

[attack.hot]
method = "kd"
temperature = 20
"""
    suite = read(tmp_path, text)
    assert [(choice.name, choice.method) for choice in suite.defenses] == [
        ("none", "none"),
        ("nasty", "nasty"),
        ("nasty-0.5", "nasty"),
        ("nasty+mild", "nasty"),
    ]
    assert [choice.instance.omega for choice in suite.defenses[1:]] == [0.04, 0.5, 0.001]
    assert [choice.instance.temperature for choice in suite.attacks] == [4.0, 20.0]
    assert {choice.origin for choice in suite.defenses} == {registry.find("defense", "nasty").origin}


# What the command line changes


def test_a_change_goes_by_its_dotted_path_and_leaves_the_rest(tmp_path: Path) -> None:
    changes = {
        "attack.kd.temperature": 20,
        "victim.recipe.epochs": 3,
        "seeds": 1,
        "robustness.level": "none",
        "scenario.access": "label",
    }
    suite, before = read(tmp_path, GOOD, changes), read(tmp_path, GOOD)
    assert suite.attacks[0].instance == KD(temperature=20.0)
    assert suite.victim_recipe == Recipe(epochs=3)
    assert suite.seeds == (0,)
    assert suite.robustness.level == "none"
    assert suite.scenario.access is Access.LABEL
    assert suite.student_recipes == before.student_recipes
    assert suite.defenses == before.defenses


def test_a_change_of_a_name_with_a_dot_is_quoted(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"nasty-0.5"]') + '[defense."nasty-0.5"]\nmethod = "nasty"\n'
    suite = read(tmp_path, text, {'defense."nasty-0.5".omega': 0.5})
    assert suite.defenses[1].instance == Nasty(omega=0.5)


@pytest.mark.parametrize("key", ["network", "networks"])
@pytest.mark.parametrize("written", ["network", "networks"])
def test_a_changed_network_counts_however_it_is_spelt(tmp_path: Path, key: str, written: str) -> None:
    value = {"network": "mini-32", "networks": ["mini-32"]}[key]
    text = HEAD + NETWORKS.replace('networks = ["mini-8", "mini-16"]', f'{written} = "mini-8"')
    assert read(tmp_path, text, {f"student.{key}": value}).students == ("mini-32",)


def test_another_data_set_does_not_inherit_the_fields_of_the_first(tmp_path: Path) -> None:
    text = NETWORKS + '[dataset]\nname = "digits"\nvalidation = 100\n'
    assert read(tmp_path, text, {"dataset": "blobs"}).dataset.fields == {"images": 96, "noise": 0.2, "seed": 0}


# The undefended victim


def test_the_undefended_victim_is_always_among_the_defenses(tmp_path: Path) -> None:
    suite = read(tmp_path, GOOD, {"defenses": ["nasty"]})
    assert [choice.name for choice in with_undefended(suite).defenses] == ["none", "nasty"]
    assert with_undefended(suite).defenses[0] == read(tmp_path, GOOD).defenses[0]


def test_a_suite_that_runs_the_undefended_victim_stays_as_it_is(tmp_path: Path) -> None:
    suite = read(tmp_path, GOOD)
    assert with_undefended(suite) is suite
