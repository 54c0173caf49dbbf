"""Surrogate data in suite files: each data set once, mistakes with their lines, digests of files."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kdbench.engine.planner import data_stage
from kdbench.zoo.photos import Photos
from suite_files import GOOD, complaint, read

KNOCKOFF = GOOD.replace('"kd"', '"knockoff"')


def test_a_suite_has_each_surrogate_data_set_of_its_attacks_once(tmp_path: Path) -> None:
    text = GOOD.replace('"kd"', '"knockoff", "adaptive-knockoff", "kd", "digital"') + (
        '[attack.adaptive-knockoff]\nmethod = "knockoff"\npolicy = "adaptive"\n'
        '[attack.digital]\nmethod = "knockoff"\nsurrogate = "digits"\n'
    )
    suite = read(tmp_path, text)
    assert [(c.name, c.method, c.instance) for c in suite.surrogates if c.name == "photos"] == [
        ("photos", "photos", Photos())
    ]
    assert sorted(choice.name for choice in suite.surrogates) == ["digits", "photos"]
    assert read(tmp_path, GOOD).surrogates == ()
    assert read(tmp_path, text, {"attacks": ["kd"]}).surrogates == ()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[attack.knockoff]\nsurrogate = "blobs"\n', 10, "attack.knockoff draws on 'blobs', the data set under "),
        (
            '[attack.knockoff]\nsurrogate = "photoz"\n',
            10,
            "There is no dataset 'photoz'. Did you mean 'photos'? Known: ",
        ),
        ('[attack.knockoff]\nsurrogate = ""\n', 10, "There is no dataset ''. Known: "),
    ],
)
def test_surrogate_data_that_cannot_be_is_named_with_the_line_of_the_attack(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    assert complaint(tmp_path, KNOCKOFF + text).startswith(f"mine.toml, line {line}: {said}")


def test_the_data_set_of_the_victim_is_no_surrogate_data_however_it_is_written(tmp_path: Path) -> None:
    text = KNOCKOFF.replace('"blobs"', '{ name = "blobs", noise = 1 }') + '[attack.knockoff]\nsurrogate = "blobs"\n'
    assert "draws on 'blobs'" in complaint(tmp_path, text)
    assert "draws on 'photos'" in complaint(tmp_path, KNOCKOFF, {"dataset": "photos"})


@pytest.mark.parametrize(("own", "surrogate"), [("cifar10", "cifar10-jpeg"), ("cifar10-jpeg", "cifar10")])
def test_surrogate_data_of_the_same_images_in_another_form_is_refused(tmp_path: Path, own: str, surrogate: str) -> None:
    text = KNOCKOFF.replace('"blobs"', f'"{own}"') + f'[attack.knockoff]\nsurrogate = "{surrogate}"\n'
    said = f"attack.knockoff draws on '{surrogate}', which holds the images of '{own}', the data set under attack."
    assert complaint(tmp_path, text) == f"mine.toml, line 10: {said}"
    assert [choice.name for choice in read(tmp_path, text, {"attack.knockoff.surrogate": "cifar100"}).surrogates] == [
        "cifar100"
    ]


def test_surrogate_data_from_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    said = complaint(tmp_path, KNOCKOFF, {"attack.knockoff.surrogate": "photoz"})
    assert said.startswith("There is no dataset 'photoz'. Did you mean 'photos'? ")


@pytest.mark.parametrize("other", ["", "[attack.partial-kd]\nfraction = 0.1\n"])
def test_default_surrogate_data_that_cannot_be_is_blamed_on_the_line_that_names_its_attack(
    tmp_path: Path, other: str
) -> None:
    said = complaint(tmp_path, KNOCKOFF.replace('"blobs"', '"photos"') + other)
    assert said.startswith("mine.toml, line 2: attack.knockoff draws on 'photos'")


def test_surrogate_data_of_an_attack_that_does_not_run_must_be_right_all_the_same(tmp_path: Path) -> None:
    assert "photoz" in complaint(tmp_path, GOOD + '[attack.knockoff]\nsurrogate = "photoz"\n')


def test_surrogate_data_that_lacks_its_argument_is_found_before_any_training(tmp_path: Path) -> None:
    assert "imagefolder:PATH" in complaint(tmp_path, KNOCKOFF + '[attack.knockoff]\nsurrogate = "imagefolder"\n')


@dataclass(frozen=True)
class Stamped(Photos):
    """Photos whose files are not the same for everybody."""

    def fingerprint(self, folder: Path) -> str:
        return f"{folder.name}-{self.images}"


def test_a_suite_is_stamped_with_the_files_of_all_its_data_sets(tmp_path: Path) -> None:
    suite = read(tmp_path, KNOCKOFF)
    own, other = (replace(one, instance=Stamped(images=n)) for one, n in ((suite.dataset, 3), (suite.surrogates[0], 5)))
    suite = replace(suite, dataset=own, surrogates=(other,))
    stamped = suite.stamped(tmp_path / "here")
    assert (stamped.dataset.files, [one.files for one in stamped.surrogates]) == ("here-3", ["here-5"])
    assert replace(stamped, dataset=own, surrogates=(other,)) == suite
    moved = suite.stamped(tmp_path / "there")
    for before, after in ((stamped.dataset, moved.dataset), (stamped.surrogates[0], moved.surrogates[0])):
        assert data_stage(before).key != data_stage(after).key
    assert [one.files for one in read(tmp_path, KNOCKOFF).stamped(tmp_path).surrogates] == [""]
