"""Numbers that papers report: which cells they are about, and what a change of the suite leaves of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdbench.engine.numerics import Numerics
from kdbench.engine.planner import make_plan
from kdbench.records import ReportedNumber
from kdbench.runs.request import Request
from kdbench.suites import reader as suites
from kdbench.suites.reported import Reported
from kdbench.suites.suite import Suite
from runs import FinishedRun, run
from suite_files import GOOD, OMEGA, Json, complaint, read


def number(**changes: Any) -> Reported:
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
def test_a_number_is_given_to_the_cells_it_is_about(
    said: Json, cell: tuple[str, str, str, str], metric: str | None
) -> None:
    expected = ReportedNumber(metric, 0.9, "a table", "paper") if metric else None
    assert number(**said).of(*cell) == expected


def test_the_record_of_a_cell_carries_what_papers_say_of_it(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """Nothing is run for it: reported numbers are in no key."""
    said: list[Json] = [
        {"defense": "nasty", "accuracy": 0.9},
        {"defense": "nasty", "attack": "kd", "accuracy": 0.8, "student": "mini-8"},
        {"attack": "cross-entropy", "accuracy": 0.7},
        {"defense": "none", "accuracy": 0.6, "victim": "mini-16"},
    ]
    numbers = [{"source": "a table", "evidence": "memory", **one} for one in said]
    cells = run(tiny({"reported": numbers}), tmp_path, store=golden.folder / "store")
    found = {name: [(one.metric, one.value) for one in cell.reported] for name, cell in cells.items()}
    assert found["nasty--kd--mini-8--seed0"] == [("victim_acc", 0.9), ("student_acc", 0.8)]
    assert (
        found["nasty--partial-kd--mini-8--seed0"] == found["nasty--hard-label--mini-8--seed0"] == [("victim_acc", 0.9)]
    )
    assert found["baseline-1-0--cross-entropy--mini-8--seed0"] == [("student_acc", 0.7)]
    assert not any(value for name, value in found.items() if name.startswith(("none", "stingy")) or "smooth" in name)
    assert {name: cell.keys for name, cell in cells.items()} == {n: c.keys for n, c in golden.cells.items()}


def test_a_number_names_a_point_of_a_sweep(tmp_path: Path) -> None:
    text = '\n[[reported]]\ndefense = "nasty+omega-1"\naccuracy = 0.9\nsource = "s"\nevidence = "paper"\n'
    suite = read(tmp_path, GOOD + OMEGA + text)
    [said] = suite.reported
    assert [bool(said.of(c.name, "kd", "mini-8", suite.victim)) for c in suite.defenses] == [False, False, True]


NUMBERS = [(name, said) for name in suites.shipped() for said in suites.load(name).reported]


@pytest.mark.parametrize(
    ("name", "said"),
    NUMBERS,
    ids=[f"{n}-{f.defense or 'no-victim'}-{f.attack}-{f.student}-{f.victim}" for n, f in NUMBERS],
)
def test_every_shipped_number_is_about_a_cell_of_its_suite(name: str, said: Reported) -> None:
    """With the victim that it names; a victim distilled into itself is run by --student, as the files say."""
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
def test_a_wrong_number_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    assert complaint(tmp_path, f"{GOOD}\n[[reported]]\n{text}").startswith(f"mine.toml, line {line}: {said}")


def test_reported_numbers_are_an_array_of_tables(tmp_path: Path) -> None:
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
def test_a_number_about_an_unknown_name_is_refused(tmp_path: Path, about: Json) -> None:
    lines = "".join(f'{name} = "{value}"\n' for name, value in about.items())
    complaint(tmp_path, f'{GOOD}\n[[reported]]\naccuracy = 0.9\nsource = "s"\nevidence = "paper"\n{lines}')


def test_a_number_of_students_trained_without_a_victim_is_about_those_with_all_the_data(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
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
def test_numbers_that_were_once_forgotten_are_there(
    name: str, about: tuple[str, str, str, str], accuracies: set[float]
) -> None:
    known = suites.load(name).reported
    assert {f.accuracy for f in known if (f.defense, f.attack, f.student, f.victim) == about} == accuracies


OF_VICTIM: Json = {"defense": "nasty"}
OF_STUDENT: Json = {"defense": "nasty", "attack": "kd"}
OF_BASELINE: Json = {"attack": "cross-entropy"}
NAMED: Json = {"student": "mini-8", "victim": "mini-16"}
ALL = (OF_VICTIM, OF_STUDENT, OF_BASELINE, OF_STUDENT | NAMED)


@pytest.mark.parametrize(
    ("path", "lost"),
    [
        ("dataset", ALL),
        ("dataset.validation", ALL),
        ("scenario.data", (OF_STUDENT, OF_BASELINE, OF_STUDENT | NAMED)),
        ("victim.network", (OF_VICTIM, OF_STUDENT)),
        ("victim.recipe.epochs", (OF_VICTIM, OF_STUDENT, OF_STUDENT | NAMED)),
        ("student.networks", (OF_STUDENT, OF_BASELINE)),
        ("student.recipe.lr", (OF_STUDENT, OF_BASELINE, OF_STUDENT | NAMED)),
        ("student.recipes.mini-16.lr", (OF_STUDENT, OF_BASELINE)),
        ("defense", ALL),
        ("defense.nasty", (OF_VICTIM, OF_STUDENT, OF_STUDENT | NAMED)),
        ("defense.nasty.omega", (OF_VICTIM, OF_STUDENT, OF_STUDENT | NAMED)),
        ("defense.stingy.ratio", ()),
        ("attack.kd.temperature", (OF_STUDENT, OF_STUDENT | NAMED)),
        ("attack.cross-entropy", (OF_BASELINE,)),
        *(
            (path, ())
            for path in ("seeds", "defenses", "attacks", "baselines", "robustness.level", "precision", "sweep")
        ),
    ],
)
def test_a_number_says_nothing_of_a_suite_that_was_changed_in_what_it_is_about(
    path: str, lost: tuple[Json, ...]
) -> None:
    assert [said for said in ALL if number(**said).lost(path.split("."))] == list(lost)


@pytest.mark.parametrize(("path", "lost"), [("defense.nasty.clip", True), ("defense.nas.clip", False), ("sweep", True)])
def test_a_number_of_a_point_is_lost_with_its_method_and_with_its_sweep(path: str, lost: bool) -> None:
    assert number(defense="nasty+omega-1").lost(path.split(".")) is lost


def test_a_reported_number_is_not_shown_beside_another_suite_than_its_own() -> None:
    changes = ["scenario.data=0.01", "defense.nasty.omega=0"]
    suite = suites.load("nasty-cifar10", Request(dataset="digits", changes=changes).tree())
    assert suite.reported == ()
    assert suite.left_out == (
        "16 of 16 reported numbers are not shown: they are not about a suite with another dataset, "
        "defense.nasty.omega, scenario.data."
    )


def test_numbers_that_a_change_does_not_concern_stay_and_those_that_it_does_are_counted() -> None:
    before, after = (suites.load("nasty-cifar10", changes) for changes in (None, {"defense.nasty.omega": 0.5}))
    assert before.left_out == ""
    assert after.reported == tuple(said for said in before.reported if said.defense != "nasty")
    assert after.left_out.startswith("6 of 16 reported numbers are not shown: ")
    picked = Request(defense=["nasty"], attack=["kd"], seeds=1, robustness="fast", student=["cnn"]).tree()
    assert suites.load("nasty-cifar10", picked).reported == before.reported
    assert suites.load("nasty-cifar10", picked).left_out == ""


def test_a_sweep_can_be_stopped_though_papers_speak_of_its_points(tmp_path: Path) -> None:
    text = '\n[[reported]]\ndefense = "nasty+omega-1"\naccuracy = 0.9\nsource = "s"\nevidence = "paper"\n'
    suite = read(tmp_path, GOOD + OMEGA + text, {"sweep": []})
    assert suite.reported == ()
    assert "another sweep" in suite.left_out


@pytest.mark.parametrize(("name", "said"), NUMBERS)
def test_every_shipped_number_names_the_networks_that_it_is_about(name: str, said: Reported) -> None:
    assert bool(said.victim) == bool(said.defense)
    assert bool(said.student) == bool(said.attack)
