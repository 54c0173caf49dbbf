"""Suite files in older words are read on, with no complaint, as what they say now."""

from pathlib import Path

import pytest

from kdbench.api import Access, Scenario
from kdbench.runs.request import Request
from kdbench.suites.old_spellings import modern, modern_path
from suite_files import GOOD, Json, complaint, read, sweep

OLD = '[threat]\nanswers = "topk"\ntopk = 2\nbudget = 100\n'
PUBLISHED = '\n[[published]]\ndefense = "nasty"\naccuracy = 0.9\nsource = "a table"\nevidence = "paper"\n'
OLD_KNOCKOFF = '\n[attack.knockoff]\npool = "fashion-mnist"\n'


def new(text: str) -> str:
    """The same file in today's words."""
    words = {"[threat]": "[scenario]", "answers": "access", "[[published]]": "[[reported]]", "pool": "surrogate"}
    for old, today in words.items():
        text = text.replace(old, today)
    return text


@pytest.mark.parametrize("text", [OLD, PUBLISHED, OLD_KNOCKOFF], ids=["threat", "published", "pool"])
@pytest.mark.filterwarnings("error")
def test_an_old_file_is_read_as_the_new_one(tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = GOOD.replace('"kd"]', '"knockoff"]') + text
    assert new(file) != file
    suite = read(tmp_path, file)
    assert suite == read(tmp_path, new(file))
    assert suite != read(tmp_path, GOOD.replace('"kd"]', '"knockoff"]'))
    assert capfd.readouterr() == ("", "")


def test_old_words_say_what_they_said(tmp_path: Path) -> None:
    suite = read(tmp_path, GOOD.replace('"kd"]', '"knockoff"]') + OLD + PUBLISHED + OLD_KNOCKOFF)
    assert suite.scenario == Scenario(access=Access.TOPK, topk=2, budget=100)
    assert [number.accuracy for number in suite.reported] == [0.9]
    assert suite.attacks[0].instance.surrogate == "fashion-mnist"
    assert [choice.name for choice in suite.surrogates] == ["fashion-mnist"]


def test_an_old_field_is_read_under_every_name_of_its_method(tmp_path: Path) -> None:
    text = GOOD.replace('"kd"]', '"stranger"]') + '[attack.stranger]\nmethod = "knockoff"\npool = "fashion-mnist"\n'
    assert read(tmp_path, text).attacks[0].instance.surrogate == "fashion-mnist"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("threat.answers=label", "scenario.access=label"),
        ("attack.knockoff.pool=blobs", "attack.knockoff.surrogate=blobs"),
    ],
)
def test_the_command_line_may_use_old_words(tmp_path: Path, change: str, field: str) -> None:
    file = GOOD.replace("blobs", "digits")
    old, today = (read(tmp_path, file, Request(changes=[text]).tree()) for text in (change, field))
    assert old == today


def test_an_old_field_can_be_swept(tmp_path: Path) -> None:
    text = GOOD.replace('"kd"]', '"knockoff"]') + sweep('"attack.knockoff.pool"', '["photos", "fashion-mnist"]')
    assert [attack.instance.surrogate for attack in read(tmp_path, text).attacks] == ["photos", "fashion-mnist"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            OLD.replace('"topk"', '"prob"'),
            "line 11: scenario.access must be one of nothing, label, topk, probs, weights",
        ),
        (OLD.replace("100", "0"), "line 13: scenario.budget must be greater than or equal to 1, not 0."),
        (PUBLISHED.replace("0.9", "90"), "line 13: reported.accuracy must be less than or equal to 1, not 90."),
    ],
)
def test_a_mistake_in_old_words_has_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert complaint(tmp_path, GOOD + text).startswith(f"mine.toml, {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[threat]\n[scenario]\naccess = "label"\n', "'threat' is the old name of 'scenario': write one of them."),
        (
            '[scenario]\naccess = "label"\nanswers = "label"\n',
            "'scenario.answers' is the old name of 'scenario.access': write one of them.",
        ),
        (
            '[attack.knockoff]\npool = "photos"\nsurrogate = "photos"\n',
            "'pool' is the old name of 'surrogate': write one of them.",
        ),
    ],
)
def test_a_thing_is_not_said_in_old_and_new_words_at_once(tmp_path: Path, text: str, said: str) -> None:
    assert complaint(tmp_path, GOOD + text).endswith(said)


def test_what_has_no_old_word_is_left_alone() -> None:
    tree: Json = {"seeds": 3, "scenario": {"budget": 1}, "attack": {"kd": {"answers": 1}}}
    assert modern(tree) == tree
    assert modern_path(("attack", "kd", "answers")) == ("attack", "kd", "answers")
    assert modern_path(("threat", "answers")) == ("scenario", "access")
    assert modern_path(()) == ()
