"""What is said of a wrong sweep, and of mistakes in a file with sweeps that would go unnoticed."""

import re
from pathlib import Path

import pytest

from kdbench.runs.request import Request
from suite_files import GOOD, OMEGA, complaint, names, read, sweep

TAIL = "such as defense.nasty.omega, not "


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            sweep('"defense.nasty"', "[1]"),
            11,
            f"sweep.vary names fields of one defense or attack, {TAIL}'defense.nasty'.",
        ),
        (
            sweep('"victim.recipe.lr"', "[1]"),
            11,
            f"sweep.vary names fields of one defense or attack, {TAIL}'victim.recipe.lr'.",
        ),
        (
            sweep('["defense.nasty.omega", "attack.kd.alpha"]', "[[1, 1]]"),
            11,
            f"sweep.vary names fields of one defense or attack, {TAIL}'defense.nasty.omega', 'attack.kd.alpha'.",
        ),
        (
            sweep('["defense.nasty.omega", "defense.stingy.ratio"]', "[[1, 1]]"),
            11,
            f"sweep.vary names fields of one defense or attack, {TAIL}'defense.nasty.omega', 'defense.stingy.ratio'.",
        ),
        (sweep("[]", "[1]"), 11, f"sweep.vary names fields of one defense or attack, {TAIL}nothing."),
        (sweep('""', "[1]"), 11, f"sweep.vary names fields of one defense or attack, {TAIL}''."),
        (sweep("3", "[1]"), 12, "sweep.vary must be a valid string or a valid array, not 3."),
        (sweep('"defense.nasty.omega"', "3"), 13, "sweep.values must be a valid array, not 3."),
        (sweep('"defense.nasty.omega"', "[]"), 11, "sweep.values must hold at least one value, not []."),
        (
            sweep('["defense.nasty.omega", "defense.nasty.tau"]', "[[1, 1], [2]]"),
            11,
            "sweep.values must hold 2 values for each point, not [2].",
        ),
        (
            sweep('["defense.nasty.omega", "defense.nasty.tau"]', "[1, 2]"),
            11,
            "sweep.values must hold 2 values for each point, not 1.",
        ),
        (
            sweep('"defense.nasty.omega"', "[1, 2, 1]"),
            11,
            "the sweep of defense.nasty.omega has two points of one name",
        ),
        (sweep('"attack.kd.alpha"', '["+", "/"]'), 11, "the sweep of attack.kd.alpha has two points of one name"),
        ('\n[[sweep]]\nvary = "defense.nasty.omega"\n', 11, "sweep: the field 'values' is missing."),
        (
            '\n[[sweep]]\nvary = "defense.nasty.omega"\nvalue = [1]\n',
            13,
            "There is no field 'value' in sweep. Did you mean 'values'?",
        ),
        (
            '\n[sweep]\nvary = "defense.nasty.omega"\nvalues = [1]\n',
            11,
            "'sweep' is written as [[sweep]], once for each.",
        ),
        ('[defense.nasty]\nmethod = "nastty"\n' + OMEGA, 11, "There is no defense 'nastty'. Did you mean 'nasty'?"),
        ("[defense.nasty]\ntau = -1\n" + OMEGA, 11, "defense.nasty+omega-0.1.tau must be greater than 0, not -1."),
        ("[defense.nasty]\ntua = 2\n" + OMEGA, 11, "There is no field 'tua' in defense.nasty+omega-0.1."),
    ],
)
def test_a_wrong_sweep_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    assert complaint(tmp_path, GOOD + text).startswith(f"mine.toml, line {line}: {said}")


def test_a_point_with_the_name_of_another_method_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"nasty", "nasty+omega-1"]') + OMEGA
    assert complaint(tmp_path, text) == "mine.toml, line 1: 'nasty+omega-1' is named twice among the defenses."


# Mistakes that would go unnoticed


def test_a_method_that_is_run_because_the_file_names_none_is_swept(tmp_path: Path) -> None:
    text = GOOD.replace('attacks = ["kd"]\n', "")
    suite = read(
        tmp_path,
        text + sweep('"attack.kd.alpha"', "[0.1]") + sweep('"attack.label-smoothing.smoothing"', "[0.1, 0.2]"),
    )
    assert [choice.name for choice in suite.attacks] == ["kd+alpha-0.1"]
    assert [choice.name for choice in suite.baselines] == [
        "cross-entropy",
        "label-smoothing+smoothing-0.1",
        "label-smoothing+smoothing-0.2",
        "hard-label",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            sweep('"defense.nasty.omega"', "[0.1, -1]"),
            "defense.nasty+omega--1.omega must be greater than or equal to 0",
        ),
        (sweep('"defense.nasty.omga"', "[0.1]"), "There is no field 'omga' in defense.nasty+omga-0.1. Did you mean"),
        (sweep('"attack.kd.queries"', '["twice"]'), "attack.kd+queries-twice.queries must be 'augmented' or 'once'"),
    ],
)
def test_a_value_or_field_that_only_a_sweep_writes_is_blamed_on_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert re.match(rf"mine\.toml, line 1[1-3]: {re.escape(said)}", complaint(tmp_path, GOOD + text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (sweep('"defense.nastty.omega"', "[0.1]"), "There is no defense 'nastty'. Did you mean 'nasty'?"),
        (sweep('"defense.stingy.ratio"', "[5]"), "ratio must be"),
        (sweep('"defense.stingy.ratoi"', "[0.5]"), "There is no field 'ratoi'"),
    ],
)
def test_a_sweep_of_a_method_that_is_not_run_must_be_right_all_the_same(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, GOOD + text)


def test_a_name_with_a_dot_can_be_swept(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"nasty-0.5"]') + '[defense."nasty-0.5"]\nmethod = "nasty"\n'
    assert names(tmp_path, text + sweep("""'defense."nasty-0.5".tau'""", "[2]")) == ["none", "nasty-0.5+tau-2"]


def test_one_field_is_not_swept_twice(tmp_path: Path) -> None:
    assert "defense.nasty.omega" in complaint(tmp_path, GOOD + OMEGA + sweep('"defense.nasty.omega"', "[2, 3]"))


@pytest.mark.parametrize("change", ["defense.nasty.omega=5", 'defense."nasty+omega-1".tau=9'])
def test_a_change_that_a_sweep_would_undo_is_refused(tmp_path: Path, change: str) -> None:
    assert "sweep" in complaint(tmp_path, GOOD + OMEGA, Request(changes=[change]).tree())


def test_a_table_of_its_own_for_a_point_is_refused(tmp_path: Path) -> None:
    text = GOOD + '[defense."nasty+omega-1"]\nmethod = "nasty"\ntau = 9\n' + OMEGA
    assert "nasty+omega-1" in complaint(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "[defense]\nnasty = 3\n" + OMEGA,
        "defense = 3\n" + GOOD + OMEGA,
        "defenses = 3\n" + GOOD.partition("\n")[2] + OMEGA,
        GOOD + "[defense.nasty]\nomega = 1\n" + sweep('"defense.nasty.omega.deep"', "[1]"),
    ],
    ids=["value for a table", "value for all tables", "value for a list", "field of a value"],
)
def test_a_mistake_elsewhere_in_the_file_is_still_a_sentence(tmp_path: Path, text: str) -> None:
    assert complaint(tmp_path, text).startswith("mine.toml, line ")
