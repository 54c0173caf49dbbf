"""What is said of a wrong suite file: one sentence, with the line."""

from pathlib import Path
from typing import Any

import pytest

from kdbench import registry
from kdbench.api import KdbenchError
from kdbench.attacks.assistant_kd import AssistantKD
from kdbench.suites import reader as suites
from suite_files import GOOD, HEAD, complaint, read

LEVELS = "'none', 'fast', 'more' or 'full'"
ELEVEN = "mine.toml, line 11: "  # of what stands on the second line after GOOD


# The command line


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"attack.kd.temperature": -1}, "attack.kd.temperature must be greater than 0, not -1."),
        ({"attack.kd.temprature": 1}, "There is no field 'temprature' in attack.kd. Did you mean 'temperature'? "),
        ({"attack.kdd.temperature": 1}, "There is no attack 'kdd'. Did you mean 'kd'? "),
        ({"defenses": ["nastty"]}, "There is no defense 'nastty'. Did you mean 'nasty'? "),
        ({"dataset": "blob"}, "There is no dataset 'blob'. Did you mean 'blobs'? "),
        ({"student.networks": ["mini-9"]}, "There is no model 'mini-9'. Did you mean 'mini-8'? "),
        ({"victims.network": "mini-8"}, "There is no field 'victims' in the suite file. Did you mean 'victim'? "),
        ({"student.networks": ["mini-8"] * 2}, "'mini-8' is named twice among the students."),
        ({"seeds": 0}, "seeds must be greater than or equal to 1"),
        ({"defenses.nasty": 1}, "'defenses.nasty' cannot be set: 'defenses' is a value, not a table."),
    ]
    for changes, said in mistakes:
        assert complaint(tmp_path, GOOD, changes).startswith(said)


def test_a_mistake_in_the_file_is_blamed_on_it_whatever_was_changed(tmp_path: Path) -> None:
    text = GOOD + "[student.recipe]\nepochs = 0\n"
    said = complaint(tmp_path, text, {"student.recipe.lr": 0.5, "defenses": ["none"]})
    assert said.startswith("mine.toml, line 11: student.recipe.epochs must be ")
    said = complaint(tmp_path, GOOD + "[attack.kdd]\nalpha = 0.5\n", {"attack.kdd.temperature": 20})
    assert said.startswith("mine.toml, line 10: There is no attack 'kdd'.")


# The file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sedes = 3\n" + GOOD, "mine.toml, line 1: There is no field 'sedes' in the suite file. Did you mean 'seeds'?"),
        (GOOD + "[defence.nasty]\nomega = 1\n", "mine.toml, line 10: There is no field 'defence' in the suite file."),
        (GOOD + "[defense.nasty]\nomega = -1\n", ELEVEN + "defense.nasty.omega must be greater than or equal to 0, not -1."),
        (GOOD + '[defense.nasty]\nomega = "x"\n', ELEVEN + "defense.nasty.omega must be a valid number, not 'x'."),
        (GOOD + "[defense.nasty]\nomga = 1\n", ELEVEN + "There is no field 'omga' in defense.nasty. Did you mean 'omega'?"),
        (GOOD + "[attack.kd]\nalpha = 1.5\n", ELEVEN + "attack.kd.alpha must be less than or equal to 1, not 1.5."),
        (GOOD + '[attack.kd]\nqueries = "twice"\n', ELEVEN + "attack.kd.queries must be 'augmented' or 'once', not 'twice'."),
        (GOOD + "[victim.recipe]\nepochs = 1.5\n", ELEVEN + "victim.recipe.epochs must be a valid integer, not 1.5."),
        (GOOD + "[student.recipe]\nmilestones = [1, -1]\n", ELEVEN + "student.recipe.milestones[1] must be greater"),
        (GOOD + "[student.recipe]\nlr = nan\n", ELEVEN + "student.recipe.lr must be a finite number, not nan."),
        (GOOD + '[threat]\nanswers = "prob"\n', ELEVEN + "scenario.access must be one of nothing, label, topk, probs, weights"),
        (GOOD + "[threat]\nbudget = 0\n", ELEVEN + "scenario.budget must be greater than or equal to 1, not 0."),
        (GOOD + '[robustness]\nlevel = "all"\n', ELEVEN + f"robustness.level must be {LEVELS}, not 'all'."),
        (GOOD + "[robustness]\neps = 0\n", ELEVEN + "robustness.eps must be greater than 0, not 0."),
        ("tolerance = 2\n" + GOOD, "mine.toml, line 1: tolerance must be less than or equal to 1, not 2."),
    ],
)  # fmt: skip
def test_a_field_that_is_unknown_or_ill_typed_is_named_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    assert complaint(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (GOOD.replace('"nasty"]', '"nastty"]'), 1, "There is no defense 'nastty'. Did you mean 'nasty'? Known: "),
        (GOOD.replace('["kd"]', '["kdd"]'), 2, "There is no attack 'kdd'. Did you mean 'kd'? Known: "),
        (
            'baselines = ["cros-entropy"]\n' + GOOD,
            1,
            "There is no attack 'cros-entropy'. Did you mean 'cross-entropy'?",
        ),
        (GOOD.replace("blobs", "blob"), 3, "There is no dataset 'blob'. Did you mean 'blobs'? Known: "),
        (GOOD.replace('"mini-16"\n', '"mini-61"\n'), 6, "There is no model 'mini-61'. Did you mean 'mini-16'? Known: "),
        (GOOD.replace('"mini-16"]', '"mini-61"]'), 9, "There is no model 'mini-61'. Did you mean 'mini-16'? Known: "),
        (GOOD + '[defense.mild]\nmethod = "nastty"\n', 11, "There is no defense 'nastty'. Did you mean 'nasty'?"),
        (GOOD + "[defense.nastty]\nomega = 1\n", 10, "There is no defense 'nastty'. Did you mean 'nasty'?"),
        (
            GOOD + '[attack.assistant-kd]\nchain = ["mini-9"]\n',
            10,
            "There is no model 'mini-9'. Did you mean 'mini-8'?",
        ),
    ],
)
def test_a_name_that_does_not_exist_is_named_with_its_line_and_the_nearest(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    assert complaint(tmp_path, text).startswith(f"mine.toml, line {line}: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace('"none", ', '"nasty", '), "line 1: 'nasty' is named twice among the defenses."),
        (GOOD.replace('["kd"]', '["kd", "kd"]'), "line 2: 'kd' is named twice among the attacks."),
        (GOOD.replace('"none", ', '"no ne", '), "line 1: 'no ne' cannot name a method: letters, digits, "),
        (GOOD.replace('"none", ', '"a/b", '), "line 1: 'a/b' cannot name a method: letters, digits, "),
        (GOOD.replace('"none", ', "3, "), "line 1: defenses[0] must be a valid string, not [3, 'nasty']."),
        ("seeds = 0\n" + GOOD, "line 1: seeds must be greater than or equal to 1 or a valid array, not 0."),
        ("seeds = []\n" + GOOD, "line 1: seeds must be a number of seeds or a list of different ones, not []."),
        ("seeds = [1, 2, 1]\n" + GOOD, "line 1: seeds must be a number of seeds or a list of different ones, not [1, "),
        ("seeds = [1, -1]\n" + GOOD, "line 1: seeds[1] must be greater than or equal to 0, not [1, -1]."),
        ('seeds = "three"\n' + GOOD, "line 1: seeds must be a valid integer or a valid array, not 'three'."),
        (
            f"seeds = {10**20 - 1}\n" + GOOD,
            f"line 1: seeds must be less than or equal to 1000 or a valid array, not {10**20 - 1}.",
        ),
        (GOOD.replace('["none", "nasty"]', "[]"), "line 1: defenses must name one defense at least, not []."),
        (GOOD.replace('["kd"]', "[]"), "line 2: attacks must name one attack at least, not []."),
        (
            GOOD.replace('"mini-16"]', '"mini-8"]'),
            "line 9: 'mini-8' is named twice among the students.",
        ),
        (
            GOOD.replace('dataset = "blobs"\n', "") + '[[dataset]]\nname = "blobs"\n',
            "line 9: 'dataset' is a name or one table of fields, [dataset], not [{'name': 'blobs'}].",
        ),
        (
            GOOD + "[threat]\nanswers = 3\n",
            "line 11: scenario.access must be one of nothing, label, topk, probs, weights, not 3.",
        ),
        ("attack = 3\n" + GOOD, "line 1: 'attack' is a table of fields, not 3."),
        (GOOD + "[defense]\nnasty = 3\n", "line 11: 'defense.nasty' is a table of fields, not 3."),
        (
            GOOD + 'networks_ = "mini-8"\n',
            "line 10: There is no field 'networks_' in student. Did you mean 'networks'?",
        ),
        (GOOD + 'network = "mini-8"\n', "line 9: student has both network and networks; write one of them."),
        (
            HEAD + '[victim]\n[student]\nnetwork = "mini-8"\n',
            "line 4: victim.network must name a network, one of cnn",
        ),
        (
            HEAD + '[victim]\nnetworks = ["mini-8", "mini-16"]\n[student]\nnetwork = "mini-8"\n',
            "line 5: victim.network names one network, not 2.",
        ),
    ],
)
def test_other_mistakes_are_named_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    assert complaint(tmp_path, text).startswith(f"mine.toml, {said}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("defense.nasty.omega = -1\n" + GOOD, 1),
        ("# [defense.nasty]\n\ndefense = { nasty = { omega = -1 } }\n" + GOOD, 3),
        (GOOD + "[defense]\nnasty = { omega = -1 }\n", 11),
        (GOOD + "[defense]\n[ defense . nasty ]\n  omega   =   -1  # too small\n", 12),
        (GOOD + '[defense."nasty"]\n"omega" = -1\n', 11),
    ],
)
def test_the_line_is_found_however_the_field_is_written(tmp_path: Path, text: str, line: int) -> None:
    said = f"mine.toml, line {line}: defense.nasty.omega must be greater than or equal to 0, not -1."
    assert complaint(tmp_path, text) == said


def test_a_name_with_a_dot_has_its_line_too(tmp_path: Path) -> None:
    text = GOOD + '[defense."nasty-0.5"]\nmethod = "nasty"\nomega = -1\n'
    assert complaint(tmp_path, text).startswith("mine.toml, line 12: defense.nasty-0.5.omega must be ")


def test_a_file_that_says_nothing_is_told_what_it_must_say(tmp_path: Path) -> None:
    assert complaint(tmp_path, "").startswith("mine.toml: victim.network must name a network, one of cnn, ")


def test_a_file_that_is_not_toml_is_named_with_the_line(tmp_path: Path) -> None:
    said = complaint(tmp_path, 'title = "x"\ndefenses = [\n')
    assert said.startswith("mine.toml is not TOML: ")
    assert "line 2" in said or "end of document" in said
    assert "(at line 1, column 9)" in complaint(tmp_path, "seeds = ?\n")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'title = "\xe9"\n')
    with pytest.raises(KdbenchError, match=r"mine\.toml is not TOML: its text is not UTF-8\.$"):
        suites.load(str(path))


def test_a_file_or_a_suite_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(KdbenchError, match=r"^There is no suite file .*none\.toml\.$"):
        suites.load(str(tmp_path / "none.toml"))
    with pytest.raises(KdbenchError) as caught:
        suites.load("digitz")
    assert str(caught.value).startswith(
        "There is no suite 'digitz'. Did you mean 'digits'? Known: adaptive-digits, assistant-cifar10, "
    )
    assert str(caught.value).endswith("A path to a .toml file works too.")


def test_what_is_registered_as_a_method_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = registry.find("attack", "kd")
    monkeypatch.setitem(registry._entries("defense"), "kd", point)
    said = complaint(tmp_path, GOOD.replace('"nasty"]', '"kd"]'))
    assert said.startswith("mine.toml, line 1: The defense 'kd' of kdbench ")
    assert said.endswith("is not a subclass of kdbench.api.Defense.")


def test_methods_that_are_left_out_must_be_right_all_the_same(tmp_path: Path) -> None:
    text = GOOD + "[attack.assistant-kd]\nalpha = 2\n"
    said = complaint(tmp_path, text, {"attacks": ["kd"]})
    assert said.startswith("mine.toml, line 11: attack.assistant-kd.alpha must be ")


def test_networks_that_an_attack_asks_for_are_known_before_any_training(tmp_path: Path) -> None:
    text = GOOD.replace('["kd"]', '["assistant-kd"]') + '[attack.assistant-kd]\nchain = ["mini-32", ""]\n'
    assert read(tmp_path, text).attacks[0].instance == AssistantKD(chain=("mini-32", ""))
    assert "There is no model 'mini-33'" in complaint(tmp_path, text.replace("mini-32", "mini-33"))
