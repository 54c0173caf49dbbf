"""Sweeps, published figures and recipes of single students: what a benchmark file says with them, and what is played."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_suite import GOOD, complaint, read

from kdbench.api import Recipe
from kdbench.defenses.nasty import Nasty
from kdbench.defenses.stingy import Stingy
from kdbench.engine.plan import Numerics, Plan, make_plan
from kdbench.game.fields import build
from kdbench.records import ReportedNumber
from kdbench.runs.command import Request
from kdbench.suites import reader as suites
from kdbench.suites.methods import with_undefended
from kdbench.suites.reported import Reported
from kdbench.suites.suite import Suite
from kdbench.suites.sweeps import Sweep, spread
from runs import DUEL, Json, Played, run

OMEGA = '\n[[sweep]]\nvary = "defense.nasty.omega"\nvalues = [0.1, 1]\n'
SWEPT = ["nasty+omega-0.1", "nasty+omega-1"]


def sweep(vary: str, values: str) -> str:
    """The table of a sweep as a file has it; its first line is blank."""
    return f"\n[[sweep]]\nvary = {vary}\nvalues = {values}\n"


def labels(folder: Path, text: str, changes: Json | None = None) -> list[str]:
    """The labels of the defenses that a file plays."""
    return [choice.name for choice in read(folder, text, changes).defenses]


# What a sweep plays


def test_a_swept_method_is_played_with_each_value_in_its_place(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"nasty", "stingy"]')
    suite, before = read(tmp_path, text + OMEGA), read(tmp_path, text)
    none, mild, strong, stingy = suite.defenses
    assert [mild.name, strong.name] == SWEPT
    assert [mild.method, strong.method] == ["nasty", "nasty"]
    assert [mild.instance, strong.instance] == [Nasty(omega=0.1), Nasty(omega=1.0)]
    assert (none, stingy) == (before.defenses[0], before.defenses[2])
    assert (suite.attacks, suite.baselines, suite.dataset) == (before.attacks, before.baselines, before.dataset)


@pytest.mark.parametrize(
    ("method", "field", "value", "label", "kept"),
    [
        ("kd", "alpha", 0.5, "kd+alpha-0.5", 0.5),
        ("kd", "alpha", 1, "kd+alpha-1", 1.0),
        ("kd", "temperature", 20.0, "kd+temperature-20", 20.0),
        ("kd", "temperature", 1e-5, "kd+temperature-1e-05", 1e-5),
        ("kd", "queries", "once", "kd+queries-once", "once"),
        ("knockoff", "pool", "fashion-mnist", "knockoff+pool-fashion-mnist", "fashion-mnist"),
        ("assistant-kd", "chain", ["mini-8", "mini-16"], "assistant-kd+chain-2", ("mini-8", "mini-16")),
        ("assistant-kd", "chain", [], "assistant-kd+chain-0", ()),
    ],
)
def test_a_label_says_the_field_and_the_value_or_how_long_a_list_is(
    tmp_path: Path, method: str, field: str, value: Any, label: str, kept: Any
) -> None:
    text = GOOD.replace('"kd"', f'"{method}"') + sweep(f'"attack.{method}.{field}"', repr([value]))
    [attack] = read(tmp_path, text).attacks
    assert (attack.name, attack.method) == (label, method)
    assert vars(attack.instance)[field] == kept


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(VALUES)
def test_whatever_the_value_a_label_is_one(value: Any) -> None:
    [(ending, _)] = Sweep("attack.kd.temperature", (value,)).points()
    assert re.fullmatch(r"[\w.+-]+", f"kd{ending}")


def test_several_fields_change_together_and_the_first_names_the_point(tmp_path: Path) -> None:
    text = GOOD + sweep('["defense.nasty.omega", "defense.nasty.tau"]', "[[0.1, 2], [1, 9]]")
    _, mild, strong = read(tmp_path, text).defenses
    assert [mild.name, strong.name] == SWEPT
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
    assert [choice.name for choice in suite.defenses] == ["none", *SWEPT]
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


def test_a_label_of_ones_own_is_swept_as_the_method_behind_it(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"mild"]') + '[defense.mild]\nmethod = "nasty"\ntau = 2\n'
    suite = read(tmp_path, text + sweep('"defense.mild.omega"', "[0.1]"))
    assert [(c.name, c.method, c.instance) for c in suite.defenses[1:]] == [
        ("mild+omega-0.1", "nasty", Nasty(omega=0.1, tau=2.0))
    ]


def test_points_share_no_table() -> None:
    tree: Json = {"defenses": ["nasty"], "defense": {"nasty": {"tau": 2.0, "recipe": {"epochs": 3}}}}
    sweeps = [Sweep("defense.nasty.recipe.lr", (0.1, 1.0)), Sweep("defense.nasty.recipe.batch", (8,))]
    assert set(spread(tree, sweeps).values()) == {"nasty"}
    assert [tree["defense"][label]["recipe"] for label in tree["defenses"]] == [
        {"epochs": 3, "lr": 0.1, "batch": 8},
        {"epochs": 3, "lr": 1.0, "batch": 8},
    ]
    assert tree["defense"]["nasty"] == {"tau": 2.0, "recipe": {"epochs": 3}}


def test_a_method_that_is_not_chosen_is_not_played_for_its_sweep(tmp_path: Path) -> None:
    assert labels(tmp_path, GOOD + OMEGA, {"defenses": ["none", "stingy"]}) == ["none", "stingy"]
    waiting = GOOD + sweep('"defense.stingy.ratio"', "[0.1, 1]")
    assert labels(tmp_path, waiting, {"defenses": ["none", "stingy"]}) == [
        "none",
        "stingy+ratio-0.1",
        "stingy+ratio-1",
    ]


def test_a_sweep_that_would_go_unplayed_unnoticed_is_refused(tmp_path: Path) -> None:
    text = GOOD + OMEGA + sweep('"defense.stingy.ratio"', "[0.1, 1]")
    said = "the defense 'stingy' is swept but not played: name it among the defenses."
    assert complaint(tmp_path, text) == f"mine.toml, line 15: {said}"
    assert complaint(tmp_path, text, {"attacks": ["kd"]}) == f"mine.toml, line 15: {said}"
    anew = {"sweep": [{"vary": "defense.stingy.ratio", "values": [1]}]}
    assert complaint(tmp_path, GOOD + OMEGA, {**anew, "defenses": ["nasty"]}) == said
    said = "the attack 'scm' is swept but not played: name it among the attacks or baselines."
    assert said in complaint(tmp_path, GOOD + sweep('"attack.scm.temperature"', "[2]"))


def test_a_point_of_a_sweep_can_be_swept(tmp_path: Path) -> None:
    text = GOOD + OMEGA + sweep("""'defense."nasty+omega-1".tau'""", "[2]")
    assert labels(tmp_path, text) == ["none", "nasty+omega-0.1", "nasty+omega-1+tau-2"]


def test_a_sweep_plans_what_its_points_written_out_would(plan: Callable[..., Plan]) -> None:
    """Stages, keys and cells: a sweep is a way of writing and nothing else."""
    vary = {
        "sweep": [{"vary": "defense.nasty.omega", "values": [0.1, 1]}, {"vary": "attack.kd.alpha", "values": [0.5]}]
    }
    written: Json = {
        "defenses": ["none", *SWEPT, "stingy"],
        "attacks": ["kd+alpha-0.5", "partial-kd"],
        "defense": {label: {"method": "nasty", "omega": omega} for label, omega in zip(SWEPT, (0.1, 1), strict=True)},
        "attack": {"kd+alpha-0.5": {"method": "kd", "alpha": 0.5}, "partial-kd": {"fraction": 0.5}},
    }
    swept, same = plan(vary), plan(written)
    assert {stage.title for stage in swept.stages.values() if stage.kind == "harden"} == {
        f"harden by {label}, seed 0" for label in SWEPT
    }
    assert {cell.name: cell.keys for cell in same.cells} == {cell.name: cell.keys for cell in swept.cells}
    assert swept.stages.keys() == same.stages.keys()


@pytest.mark.parametrize("name", suites.shipped())
def test_every_shipped_sweep_is_played_at_all_its_points(name: str) -> None:
    suite = suites.load(name)
    tree = tomllib.loads((files("kdbench.benchmarks") / "suites" / f"{name}.toml").read_text(encoding="utf-8"))
    played = {"defense": suite.defenses, "attack": suite.attacks + suite.baselines}
    for table in tree.get("sweep", []):
        swept = build(Sweep, table, "sweep")
        kind, label = swept.method
        for ending, _ in swept.points():
            points = [c for c in played[kind] if c.name.startswith(f"{label}+") and f"{ending}+" in f"{c.name}+"]
            assert points, (label, ending)


# Sweeps and the command line


def test_a_defense_that_is_chosen_is_swept(tmp_path: Path) -> None:
    changes = Request(defense=["nasty"]).tree()
    assert labels(tmp_path, GOOD + OMEGA, changes) == SWEPT
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
    assert labels(tmp_path, GOOD + OMEGA, anew) == ["none", "nasty+tau-2"]
    assert read(tmp_path, GOOD + OMEGA, Request(changes=["sweep=[]"]).tree()) == read(tmp_path, GOOD)


# What is said of a wrong sweep

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
            "the sweep of defense.nasty.omega has two points of one label",
        ),
        (sweep('"attack.kd.alpha"', '["+", "/"]'), 11, "the sweep of attack.kd.alpha has two points of one label"),
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


def test_a_point_with_the_label_of_another_method_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"nasty", "nasty+omega-1"]') + OMEGA
    assert complaint(tmp_path, text) == "mine.toml, line 1: 'nasty+omega-1' is named twice among the defenses."


# Mistakes that would go unnoticed


def test_a_method_that_is_played_because_the_file_names_none_is_swept(tmp_path: Path) -> None:
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
def test_a_sweep_of_a_method_that_is_not_played_must_be_right_all_the_same(
    tmp_path: Path, text: str, said: str
) -> None:
    assert said in complaint(tmp_path, GOOD + text)


def test_a_label_with_a_dot_can_be_swept(tmp_path: Path) -> None:
    text = GOOD.replace('"nasty"]', '"nasty-0.5"]') + '[defense."nasty-0.5"]\nmethod = "nasty"\n'
    assert labels(tmp_path, text + sweep("""'defense."nasty-0.5".tau'""", "[2]")) == ["none", "nasty-0.5+tau-2"]


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


# What papers say


def figure(**changes: Any) -> Reported:
    return Reported(**{"accuracy": 0.9, "source": "a table", "evidence": "paper", **changes})


@pytest.mark.parametrize(
    ("said", "cell", "metric"),
    [
        ({"defense": "nasty"}, ("nasty", "kd", "mini-8", "mini-16"), "victim_acc"),
        ({"defense": "nasty"}, ("nasty", "hard-label", "mini-16", "mini-8"), "victim_acc"),
        ({"defense": "nasty"}, ("none", "kd", "mini-8", "mini-16"), None),
        ({"defense": "nasty"}, ("", "cross-entropy", "mini-8", "mini-16"), None),
        ({"defense": "nasty", "victim": "mini-16"}, ("nasty", "kd", "mini-8", "mini-16"), "victim_acc"),
        ({"defense": "nasty", "victim": "mini-16"}, ("nasty", "kd", "mini-8", "mini-8"), None),
        ({"defense": "nasty", "attack": "kd"}, ("nasty", "kd", "mini-8", "mini-16"), "student_acc"),
        ({"defense": "nasty", "attack": "kd"}, ("nasty", "partial-kd", "mini-8", "mini-16"), None),
        (
            {"defense": "nasty", "attack": "kd", "student": "mini-8"},
            ("nasty", "kd", "mini-8", "mini-16"),
            "student_acc",
        ),
        ({"defense": "nasty", "attack": "kd", "student": "mini-8"}, ("nasty", "kd", "mini-16", "mini-16"), None),
        ({"attack": "cross-entropy"}, ("", "cross-entropy", "mini-8", "mini-16"), "student_acc"),
        ({"attack": "cross-entropy", "student": "mini-8"}, ("", "cross-entropy", "mini-16", "mini-16"), None),
        ({"attack": "hard-label"}, ("nasty", "hard-label", "mini-8", "mini-16"), None),
    ],
)
def test_a_figure_is_given_to_the_cells_it_is_about(
    said: Json, cell: tuple[str, str, str, str], metric: str | None
) -> None:
    expected = ReportedNumber(metric, 0.9, "a table", "paper") if metric else None
    assert figure(**said).of(*cell) == expected


def test_the_record_of_a_cell_carries_what_papers_say_of_it(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """Nothing is played for it: figures are in no key."""
    said: list[Json] = [
        {"defense": "nasty", "accuracy": 0.9},
        {"defense": "nasty", "attack": "kd", "accuracy": 0.8, "student": "mini-8"},
        {"attack": "cross-entropy", "accuracy": 0.7},
        {"defense": "none", "accuracy": 0.6, "victim": "mini-16"},
    ]
    figures = [{"source": "a table", "evidence": "memory", **one} for one in said]
    cells = run(tiny({"reported": figures}), tmp_path, store=golden.folder / "store")
    found = {name: [(one.metric, one.value) for one in cell.reported] for name, cell in cells.items()}
    assert found["nasty--kd--mini-8--seed0"] == [("victim_acc", 0.9), ("student_acc", 0.8)]
    assert (
        found["nasty--partial-kd--mini-8--seed0"] == found["nasty--hard-label--mini-8--seed0"] == [("victim_acc", 0.9)]
    )
    assert found["baseline-1-0--cross-entropy--mini-8--seed0"] == [("student_acc", 0.7)]
    assert not any(value for name, value in found.items() if name.startswith(("none", "stingy")) or "smooth" in name)
    assert {name: cell.keys for name, cell in cells.items()} == {n: c.keys for n, c in golden.cells.items()}


def test_a_figure_names_a_point_of_a_sweep_by_its_label(tmp_path: Path) -> None:
    text = '\n[[reported]]\ndefense = "nasty+omega-1"\naccuracy = 0.9\nsource = "s"\nevidence = "paper"\n'
    suite = read(tmp_path, GOOD + OMEGA + text)
    [said] = suite.reported
    assert [bool(said.of(c.name, "kd", "mini-8", suite.victim)) for c in suite.defenses] == [False, False, True]


FIGURES = [(name, said) for name in suites.shipped() for said in suites.load(name).reported]


@pytest.mark.parametrize(
    ("name", "said"), FIGURES, ids=[f"{n}-{f.defense or 'alone'}-{f.attack}-{f.student}-{f.victim}" for n, f in FIGURES]
)
def test_every_shipped_figure_is_about_a_cell_of_its_suite(name: str, said: Reported) -> None:
    """With the victim that it names; a victim that distils into itself is played by --student too, as the files say."""
    changes: Json = {"seeds": 1, **({"victim.network": said.victim} if said.victim else {})}
    if said.student == said.victim != "":
        changes["student.networks"] = [said.student]
    suite = suites.load(name, changes)
    plan = make_plan(suite, Numerics(), "d", {choice.name: "e" for choice in suite.surrogates})
    about = [
        c for c in plan.cells if said.of(c.defense.name if c.defense else "", c.attack.name, c.student, suite.victim)
    ]
    assert about
    if said.attack:
        assert {c.attack.name for c in about} == {said.attack}
        assert not said.student or len(about) == 1


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('source = "s"\nevidence = "paper"\n', 11, "reported: the field 'accuracy' is missing."),
        ('accuracy = 0.9\nevidence = "paper"\n', 11, "reported: the field 'source' is missing."),
        ('accuracy = 0.9\nsource = "s"\n', 11, "reported: the field 'evidence' is missing."),
        ('accuracy = 90.1\nsource = "s"\n', 12, "reported.accuracy must be less than or equal to 1, not 90.1."),
        ('accuracy = 0.9\nevidence = "rumour"\n', 13, "reported.evidence must be 'code', 'paper', 'issue', 'log', "),
        (
            'acuracy = 0.9\nevidence = "paper"\n',
            12,
            "There is no field 'acuracy' in reported. Did you mean 'accuracy'?",
        ),
    ],
)
def test_a_wrong_figure_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    assert complaint(tmp_path, f"{GOOD}\n[[reported]]\n{text}").startswith(f"mine.toml, line {line}: {said}")


def test_figures_are_an_array_of_tables(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD + "\n[reported]\naccuracy = 0.9\n")
    assert said == "mine.toml, line 11: 'reported' is written as [[reported]], once for each."


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"defense": "nastty"},
        {"defense": "nasty", "attack": "kdd"},
        {"defense": "nasty", "attack": "kd", "student": "mini-9"},
        {"defense": "nasty", "victim": "mini-61"},
    ],
    ids=str,
)
def test_a_figure_about_nothing_there_is_is_refused(tmp_path: Path, about: Json) -> None:
    lines = "".join(f'{name} = "{value}"\n' for name, value in about.items())
    complaint(tmp_path, f'{GOOD}\n[[reported]]\naccuracy = 0.9\nsource = "s"\nevidence = "paper"\n{lines}')


def test_a_figure_of_students_trained_alone_is_about_those_with_all_the_data(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    said = {"attack": "cross-entropy", "accuracy": 0.7, "source": "s", "evidence": "paper"}
    cells = run(tiny({"reported": [said]}), tmp_path, store=golden.folder / "store")
    assert [name for name, cell in cells.items() if cell.reported] == ["baseline-1-0--cross-entropy--mini-8--seed0"]


@pytest.mark.parametrize(
    ("name", "about", "accuracies"),
    [
        ("deep-inversion-cifar10", ("none", "", "", "vgg-11"), {0.9234, 0.9225}),
        ("deep-inversion-cifar10", ("none", "deep-inversion", "vgg-11", "vgg-11"), {0.8416}),
        ("deep-inversion-cifar10", ("none", "adaptive-deep-inversion", "vgg-11", "vgg-11"), {0.9078}),
        ("deep-inversion-cifar10", ("none", "deep-inversion", "resnet-18", "vgg-11"), {0.8382}),
        ("deep-inversion-cifar10", ("none", "adaptive-deep-inversion", "resnet-18", "vgg-11"), {0.9036}),
        ("assistant-cifar10", ("none", "", "", "distillation-cifar10"), {0.7791}),
        (
            "assistant-cifar10",
            ("assistant-distillation+temperature-20+steps-1", "", "", "distillation-cifar10"),
            {0.8038},
        ),
    ],
)
def test_figures_that_were_once_forgotten_are_there(
    name: str, about: tuple[str, str, str, str], accuracies: set[float]
) -> None:
    known = suites.load(name).reported
    assert {f.accuracy for f in known if (f.defense, f.attack, f.student, f.victim) == about} == accuracies


OF_VICTIM: Json = {"defense": "nasty"}
OF_THEFT: Json = {"defense": "nasty", "attack": "kd"}
OF_BASELINE: Json = {"attack": "cross-entropy"}
NAMED: Json = {"student": "mini-8", "victim": "mini-16"}
ALL = (OF_VICTIM, OF_THEFT, OF_BASELINE, OF_THEFT | NAMED)


@pytest.mark.parametrize(
    ("path", "lost"),
    [
        ("dataset", ALL),
        ("dataset.validation", ALL),
        ("scenario.data", (OF_THEFT, OF_BASELINE, OF_THEFT | NAMED)),
        ("victim.network", (OF_VICTIM, OF_THEFT)),
        ("victim.recipe.epochs", (OF_VICTIM, OF_THEFT, OF_THEFT | NAMED)),
        ("student.networks", (OF_THEFT, OF_BASELINE)),
        ("student.recipe.lr", (OF_THEFT, OF_BASELINE, OF_THEFT | NAMED)),
        ("student.recipes.mini-16.lr", (OF_THEFT, OF_BASELINE)),
        ("defense", ALL),
        ("defense.nasty", (OF_VICTIM, OF_THEFT, OF_THEFT | NAMED)),
        ("defense.nasty.omega", (OF_VICTIM, OF_THEFT, OF_THEFT | NAMED)),
        ("defense.stingy.ratio", ()),
        ("attack.kd.temperature", (OF_THEFT, OF_THEFT | NAMED)),
        ("attack.cross-entropy", (OF_BASELINE,)),
        *(
            (path, ())
            for path in ("seeds", "defenses", "attacks", "baselines", "robustness.level", "precision", "sweep")
        ),
    ],
)
def test_a_figure_says_nothing_of_a_game_that_was_changed_in_what_it_is_about(
    path: str, lost: tuple[Json, ...]
) -> None:
    assert [said for said in ALL if figure(**said).lost(path.split("."))] == list(lost)


@pytest.mark.parametrize(("path", "lost"), [("defense.nasty.clip", True), ("defense.nas.clip", False), ("sweep", True)])
def test_a_figure_of_a_point_is_lost_with_its_method_and_with_its_sweep(path: str, lost: bool) -> None:
    assert figure(defense="nasty+omega-1").lost(path.split(".")) is lost


def test_a_paper_is_not_set_beside_another_game_than_its_own() -> None:
    changes = ["scenario.data=0.01", "defense.nasty.omega=0"]
    suite = suites.load("nasty-cifar10", Request(dataset="digits", changes=changes).tree())
    assert suite.reported == ()
    assert suite.left_out == (
        "16 of 16 published figures are not shown: they are not about a game with another dataset, "
        "defense.nasty.omega, scenario.data."
    )


def test_figures_that_a_change_does_not_concern_stay_and_those_that_it_does_are_counted() -> None:
    before, after = (suites.load("nasty-cifar10", changes) for changes in (None, {"defense.nasty.omega": 0.5}))
    assert before.left_out == ""
    assert after.reported == tuple(said for said in before.reported if said.defense != "nasty")
    assert after.left_out.startswith("6 of 16 published figures are not shown: ")
    picked = Request(defense=["nasty"], attack=["kd"], seeds=1, robustness="fast", student=["cnn"]).tree()
    assert suites.load("nasty-cifar10", picked).reported == before.reported
    assert suites.load("nasty-cifar10", picked).left_out == ""


def test_a_sweep_can_be_stopped_though_papers_speak_of_its_points(tmp_path: Path) -> None:
    text = '\n[[reported]]\ndefense = "nasty+omega-1"\naccuracy = 0.9\nsource = "s"\nevidence = "paper"\n'
    suite = read(tmp_path, GOOD + OMEGA + text, {"sweep": []})
    assert suite.reported == ()
    assert "another sweep" in suite.left_out


@pytest.mark.parametrize(("name", "said"), FIGURES)
def test_every_shipped_figure_names_the_networks_that_it_is_about(name: str, said: Reported) -> None:
    assert bool(said.victim) == bool(said.defense)
    assert bool(said.student) == bool(said.attack)


# Recipes of single students


def test_a_student_has_the_common_recipe_with_the_changes_of_its_own(tmp_path: Path) -> None:
    text = GOOD + "[student.recipe]\nepochs = 3\nlr = 0.5\n[student.recipes.mini-8]\nlr = 0.01\nflip = true\n"
    suite = read(tmp_path, text)
    assert suite.student_recipes == {
        "mini-8": Recipe(epochs=3, lr=0.01, flip=True),
        "mini-16": Recipe(epochs=3, lr=0.5),
    }
    assert suite.victim_recipe == Recipe()


def test_a_recipe_of_a_student_that_does_not_play_waits_for_it(tmp_path: Path) -> None:
    text = GOOD + "[student.recipes.mini-32]\nlr = 0.01\n"
    assert read(tmp_path, text).student_recipes == {name: Recipe() for name in ("mini-8", "mini-16")}
    changed = read(tmp_path, text, Request(student=["mini-32"]).tree())
    assert changed.student_recipes == {"mini-32": Recipe(lr=0.01)}


def test_the_command_line_changes_the_recipe_of_one_student(tmp_path: Path) -> None:
    suite = read(tmp_path, GOOD, Request(changes=["student.recipes.mini-8.lr=2"]).tree())
    assert suite.student_recipes == {"mini-8": Recipe(lr=2.0), "mini-16": Recipe()}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[student.recipes.mini-9]\nlr = 1\n", 10, "There is no model 'mini-9'. Did you mean 'mini-8'?"),
        (
            "[student.recipes.mini-8]\nlrr = 1\n",
            11,
            "There is no field 'lrr' in student.recipes.mini-8. Did you mean 'lr'?",
        ),
        ("[student.recipes.mini-8]\nlr = -1\n", 11, "student.recipes.mini-8.lr must be greater than 0, not -1."),
        ("[student.recipes]\nmini-8 = 3\n", 11, "'student.recipes.mini-8' is a table of fields, not 3."),
        (
            "[student.recipe]\nlr = -1\n[student.recipes.mini-8]\nlr = 1\n",
            11,
            "student.recipe.lr must be greater than 0",
        ),
        ("[victim.recipes.mini-16]\nlr = 1\n", 10, "There is no field 'recipes' in victim. Did you mean 'recipe'?"),
    ],
)
def test_a_wrong_recipe_of_a_student_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    assert complaint(tmp_path, GOOD + text).startswith(f"mine.toml, line {line}: {said}")


@pytest.mark.parametrize("field", ["lrr = 1", "lr = -1"])
def test_a_recipe_of_a_student_that_does_not_play_must_be_right_all_the_same(tmp_path: Path, field: str) -> None:
    complaint(tmp_path, f"{GOOD}[student.recipes.mini-32]\n{field}\n")


TWO: Json = {"student.networks": ["mini-8", "mini-16"]}


def test_the_thefts_of_that_student_and_no_other_stage_depend_on_its_recipe(plan: Callable[..., Plan]) -> None:
    before, after = plan(TWO), plan({**TWO, "student.recipes.mini-8.lr": 0.5})
    anew = [stage for key, stage in after.stages.items() if key not in before.stages]
    assert {stage.kind for stage in anew} == {"steal", "evaluate"}
    assert {(stage.spec.get("network") or stage.spec["student"]["network"])["name"] for stage in anew} == {"mini-8"}
    assert len(anew) == 2 * len([cell for cell in after.cells if cell.student == "mini-8"])
    for stage in after.stages.values():
        if stage.kind == "steal":
            assert stage.spec["recipe"]["lr"] == {"mini-8": 0.5, "mini-16": 0.05}[stage.spec["network"]["name"]]
            assert stage.spec["recipe"]["epochs"] == 2
            assert set(stage.spec["recipe"]) == {field.name for field in fields(Recipe)}


def test_the_record_of_a_cell_says_by_which_recipe_its_student_was_trained(
    golden: Played, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    suite = tiny({**DUEL, **TWO, "student.recipes.mini-16.lr": 0.5, "student.recipes.mini-16.epochs": 1})
    cells = run(suite, golden.copy(tmp_path))
    said = {cell.student: cell.protocol["student_recipe"] for cell in cells.values()}
    assert {name: (recipe["lr"], recipe["epochs"]) for name, recipe in said.items()} == {
        "mini-8": (0.05, 2),
        "mini-16": (0.5, 1),
    }
    small = cells["none--kd--mini-8--seed0"]
    assert small.keys == golden.cells[small.name].keys
    assert cells["none--kd--mini-16--seed0"].metrics["queries"] == 96  # one epoch


def test_a_shipped_student_that_learns_otherwise_has_its_own_recipe() -> None:
    recipes = suites.load("nasty-cifar10").student_recipes
    assert (recipes["cnn"].optimizer, recipes["cnn"].epochs) == ("adam", 100)
    assert recipes["preresnet-20"] == recipes["resnet-18"] == suites.load("nasty-cifar10").victim_recipe
    assert Stingy() in [choice.instance for choice in suites.load("stingy-cifar10").defenses]
