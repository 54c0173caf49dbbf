"""Recipes of single students: what a suite file says, and which stages depend on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kdbench.api import Recipe
from kdbench.engine.plan import Plan
from kdbench.engine.specs import EvaluateSpec, StealSpec
from kdbench.runs.request import Request
from kdbench.suites import reader as suites
from kdbench.suites.suite import Suite
from runs import ONE_CELL, FinishedRun, run
from suite_files import GOOD, Json, complaint, read


def test_a_student_has_the_common_recipe_with_the_changes_of_its_own(tmp_path: Path) -> None:
    text = GOOD + "[student.recipe]\nepochs = 3\nlr = 0.5\n[student.recipes.mini-8]\nlr = 0.01\nflip = true\n"
    suite = read(tmp_path, text)
    assert suite.student_recipes == {
        "mini-8": Recipe(epochs=3, lr=0.01, flip=True),
        "mini-16": Recipe(epochs=3, lr=0.5),
    }
    assert suite.victim_recipe == Recipe()


def test_a_recipe_of_a_student_that_is_not_run_is_kept_for_it(tmp_path: Path) -> None:
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
def test_a_recipe_of_a_student_that_is_not_run_must_be_right_all_the_same(tmp_path: Path, field: str) -> None:
    complaint(tmp_path, f"{GOOD}[student.recipes.mini-32]\n{field}\n")


TWO: Json = {"student.networks": ["mini-8", "mini-16"]}


def test_the_attack_runs_of_that_student_and_no_other_stage_depend_on_its_recipe(plan: Callable[..., Plan]) -> None:
    before, after = plan(TWO), plan({**TWO, "student.recipes.mini-8.lr": 0.5})
    anew = [stage for key, stage in after.stages.items() if key not in before.stages]
    assert {stage.kind for stage in anew} == {"steal", "evaluate"}
    assert {student(stage.spec) for stage in anew} == {"mini-8"}
    assert len(anew) == 2 * len([cell for cell in after.cells if cell.student == "mini-8"])
    for stage in after.stages.values():
        if isinstance(stage.spec, StealSpec):
            rate = {"mini-8": 0.5, "mini-16": 0.05}[student(stage.spec)]
            assert stage.spec.training.recipe == Recipe(epochs=2, batch=32, lr=rate)


def student(spec: object) -> str:
    """The network of the student that a stage trains or evaluates."""
    if isinstance(spec, StealSpec):
        return spec.training.network.name
    assert isinstance(spec, EvaluateSpec)
    assert spec.student
    return spec.student.network.name


def test_the_record_of_a_cell_says_by_which_recipe_its_student_was_trained(
    golden: FinishedRun, tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    suite = tiny({**ONE_CELL, **TWO, "student.recipes.mini-16.lr": 0.5, "student.recipes.mini-16.epochs": 1})
    cells = run(suite, golden.copy(tmp_path))
    said = {cell.student: cell.protocol.student_recipe for cell in cells.values()}
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
