"""What the options of `kdbench run` become: changes of the suite file."""

import pytest

from kdbench.api import KdbenchError
from kdbench.runs.request import Request
from kdbench.suites import reader as suites


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("attack.kd.temperature=20", "attack.kd.temperature", 20),
        ("victim.recipe.lr=1e-3", "victim.recipe.lr", 0.001),
        ("victim.recipe.flip=true", "victim.recipe.flip", True),
        ("victim.recipe.milestones=[1, 2]", "victim.recipe.milestones", [1, 2]),
        ('victim.network="mini-8"', "victim.network", "mini-8"),
        ("victim.network=mini-8", "victim.network", "mini-8"),
        ("title=a=b", "title", "a=b"),
        ("seeds=[3, 5]", "seeds", [3, 5]),
    ],
)
def test_a_value_is_read_as_toml_and_what_is_not_toml_is_text(text: str, path: str, value: object) -> None:
    assert Request(changes=(text,)).tree() == {path: value}


def test_options_become_changes_of_the_suite_file() -> None:
    request = Request(
        defense=("nasty", "stingy"),
        attack=("kd",),
        dataset="blobs",
        student=("mini-8",),
        seeds=2,
        robustness="none",
        changes=("attack.kd.alpha=1.0",),
    )
    suite = suites.load("digits", request.tree())
    assert [choice.name for choice in suite.defenses] == ["nasty", "stingy"]
    assert [choice.name for choice in suite.attacks] == ["kd"]
    assert (suite.dataset.name, suite.students, suite.seeds) == ("blobs", ("mini-8",), (0, 1))
    assert suite.robustness.level == "none"
    assert suite.attacks[0].instance.alpha == 1.0
    assert Request().tree() == {}


def test_a_change_without_a_value_is_a_mistake() -> None:
    with pytest.raises(KdbenchError, match="--set takes PATH=VALUE"):
        Request(changes=("seeds",)).tree()
