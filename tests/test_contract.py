"""The contract of defenses and attacks, over everything that is registered and over variants of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import blobs, context, playable
from kdbench import registry
from kdbench.api import (
    Access,
    Attack,
    Dataset,
    Defense,
    Images,
    KdbenchError,
    Oracle,
    Scenario,
    fit,
)
from kdbench.attacks.averager import Averager
from kdbench.attacks.deep_inversion import DeepInversion
from kdbench.attacks.denoise import Denoise
from kdbench.attacks.hard_label import HardLabel
from kdbench.attacks.kd import KD
from kdbench.attacks.kd_grid import KDGrid
from kdbench.attacks.knockoff import Knockoff
from kdbench.attacks.scm import SCM
from kdbench.attacks.skeptical import Skeptical
from kdbench.defenses.adaptive_misinformation import AdaptiveMisinformation
from kdbench.defenses.gaussian_noise import GaussianNoise
from kdbench.defenses.mad import MAD
from kdbench.defenses.reverse_sigmoid import ReverseSigmoid
from kdbench.defenses.stingy import Stingy
from kdbench.game.fields import build
from kdbench.testing import check_attack, check_defense

# Registered methods whose defaults are too slow for a test.
SMALL: dict[str, dict[str, Any]] = {
    "adversarial-sparse": {"iterations": 2},
    "deep-inversion": {"images": 32, "batch": 16, "iterations": 3, "steps": 2, "competition": 1.0},
    "denoise": {"examples": 256, "epochs": 5},
    "kd-grid": {"temperatures": [4.0, 1.0], "alphas": [0.9]},
    "scm": {"models": ["", ""]},
    "dfme": {"queries": 448, "batch": 16, "width": 4, "noise": 8},
    "knockoff": {"queries": 80, "batch": 32, "clusters": 6, "policy": "adaptive"},
}


def method(kind: str, name: str) -> Any:
    return build(registry.load(kind, name), SMALL.get(name, {}), f"{kind}.{name}")


DEFENSES: list[Defense] = [
    MAD(keep_argmax=False),
    AdaptiveMisinformation(exposure=0.0, threshold=0.9),
    Stingy(hidden="zero"),
    GaussianNoise(2.0),
    ReverseSigmoid(beta=5.0, gamma=2.0),
]
INVERSION = DeepInversion(images=32, batch=16, iterations=3, queries="once")
ATTACKS: list[Attack] = [
    INVERSION,
    replace(INVERSION, competition=1.0, steps=2),
    Averager(average="probabilities", queries="once"),
    Denoise(guess=("mad", "top-k:k=2"), examples=256, epochs=5, queries="once"),
    KDGrid(temperatures=(4.0, 1.0), alphas=(0.9,), queries="once"),
    Knockoff(queries=80, batch=32),
    SCM(models=("", ""), queries="once"),
    Skeptical(delay=0.5, queries="once"),
]


# Everything registered


@pytest.mark.parametrize("name", registry.names("defense"))
def test_every_registered_defense_keeps_the_contract(name: str) -> None:
    check_defense(method("defense", name))


@pytest.mark.parametrize("name", registry.names("attack"))
def test_every_registered_attack_keeps_the_contract(name: str) -> None:
    check_attack(method("attack", name))


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_variants_of_defenses_keep_the_contract(defense: Defense) -> None:
    check_defense(defense)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_variants_of_attacks_keep_the_contract(attack: Attack) -> None:
    check_attack(attack)


@pytest.mark.parametrize("name", playable("model"))
def test_every_registered_network_makes_logits_of_images(name: str) -> None:
    network = registry.load("model", name)((3, 32, 32), 10).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", playable("dataset"))
def test_every_registered_data_set_is_images_with_labels_or_says_where_it_looked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", unreachable)  # a test downloads nothing
    dataset: Dataset = registry.load("dataset", name)()
    try:
        images = dataset.load(tmp_path)
    except KdbenchError as error:
        missing = str(error)  # nothing lies in that folder
    else:
        check_images(images)
        return
    assert str(tmp_path) in missing


def unreachable(*_: object, **__: object) -> None:
    raise URLError("no network")


def check_images(images: Images) -> None:
    for split in (images.train, images.validation, images.test):
        data = split.to("cpu")
        assert len(data) == len(data.y) > 0
        assert (data.shape, data.classes) == (images.train.shape, images.train.classes)
        assert 0 <= data.x.min() < data.x.max() <= 1
        assert 0 <= data.y.min() <= data.y.max() < data.classes


@pytest.fixture(scope="module")
def victim() -> nn.Module:
    ctx = context(blobs().train, epochs=12, seed=1)
    net = ctx.new_student()
    fit(net, F.cross_entropy, ctx.data.x, ctx.data.y, ctx)
    return net.requires_grad_(False)


def student_of(attack: Attack, defense: Defense, victim: nn.Module, answers: Access = Access.PROBS) -> nn.Module:
    data = blobs().train
    service = defense.serve(victim, context(data))
    return attack.steal(Oracle(service, Scenario(access=answers), victim), context(data))


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", registry.names("defense"))
@pytest.mark.parametrize("queries", ["augmented", "once"])
@pytest.mark.parametrize("answers", [Access.LABEL, Access.PROBS])
def test_the_hard_label_attack_is_blind_to_answers_that_keep_the_label(
    name: str, queries: Literal["augmented", "once"], answers: Access, victim: nn.Module
) -> None:
    defense = method("defense", name)
    deployed = defense.harden(victim, context(blobs().train)).eval()
    met, unmet = (student_of(HardLabel(queries), served, deployed, answers) for served in (defense, Defense()))
    assert same(met, unmet) or not keeps_labels(defense, deployed)


def keeps_labels(defense: Defense, model: nn.Module) -> bool:
    data = blobs().train
    served = defense.serve(model, context(data))(data.x)
    return torch.equal(served.argmax(dim=1), model(data.x).argmax(dim=1))


@pytest.mark.parametrize("name", ["none", "stingy", "nasty"])
def test_built_in_defenses_keep_the_label_when_they_answer(name: str, victim: nn.Module) -> None:
    assert keeps_labels(method("defense", name), victim)


def test_kd_does_see_what_stingy_withholds(victim: nn.Module) -> None:
    assert not same(student_of(KD(), method("defense", "stingy"), victim), student_of(KD(), Defense(), victim))
