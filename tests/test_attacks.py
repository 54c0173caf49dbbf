"""What all registered attacks keep beyond the contract: truncated answers, unknown labels, eval mode, what is adaptive."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import accuracy, blobs, context, equal, taught, undefended
from kdbench import registry
from kdbench.api import Access, Attack, Context, DataSubset, Oracle, Scenario, Split, predict_logits
from kdbench.attacks.htc import HTC
from kdbench.attacks.kd import KD
from kdbench.attacks.kd_grid import KDGrid
from kdbench.attacks.scm import SCM
from kdbench.attacks.skeptical import Skeptical
from kdbench.game.fields import build

EPOCHS = 2
# Methods whose defaults are too slow for a test.
SMALL: dict[str, dict[str, Any]] = {
    "deep-inversion": {"images": 32, "batch": 16, "iterations": 3},
    "denoise": {"examples": 256, "epochs": 5},
    "dfme": {"queries": 448, "batch": 16, "width": 4, "noise": 8},
    "kd-grid": {"temperatures": [4.0, 1.0], "alphas": [0.9]},
    "knockoff": {"queries": 80, "batch": 32, "clusters": 6},
    "scm": {"models": ["", ""]},
}
ATTACKS = {name: build(registry.load("attack", name), SMALL.get(name, {}), name) for name in registry.names("attack")}
BASELINES = [name for name, attack in ATTACKS.items() if attack.needs is Access.NOTHING]
QUERYING = [name for name in ATTACKS if name not in BASELINES]
WITH_IMAGES = [name for name in QUERYING if ATTACKS[name].data_subset().fraction]
ONCE = [name for name in WITH_IMAGES if "queries" in vars(ATTACKS[name])]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


def attacker(attack: Attack, data: Split, epochs: int = EPOCHS, seed: int = 0) -> Context:
    """The context of an attacker with the images and the surrogate data that `attack` declares."""
    generator = torch.Generator().manual_seed(5)
    surrogate = torch.rand(100, *data.shape, generator=generator)
    return replace(context(images_of(attack, data), epochs, seed), surrogate=lambda _: surrogate)


def images_of(attack: Attack, data: Split) -> Split:
    """The images that `attack` uses, balanced even where the attacker does not know the labels."""
    subset = attack.data_subset().of(blobs().train)
    return subset if data.labelled else subset.without_labels()


def steal(attack: Attack, data: Split, victim: nn.Module, scenario: Scenario, epochs: int = EPOCHS) -> nn.Module:
    return attack.steal(Oracle(undefended(victim), scenario, victim), attacker(attack, data, epochs))


def test_every_attack_that_sees_no_more_than_labels_says_so() -> None:
    assert [name for name, attack in ATTACKS.items() if attack.labels_only] == ["hard-label"]


def test_those_made_to_undo_defenses_say_that_they_are_adaptive() -> None:
    adaptive = {name for name, attack in ATTACKS.items() if attack.adaptive}
    assert adaptive == {"averager", "denoise", "htc", "kd-grid", "scm", "skeptical"}
    assert all(ATTACKS[name].needs is Access.TOPK for name in adaptive)


def test_those_without_images_of_their_own_say_so() -> None:
    assert {name for name in QUERYING if name not in WITH_IMAGES} == {"deep-inversion", "dfme", "knockoff"}
    assert ATTACKS["dfme"].data_subset() == DataSubset(0.0)
    assert [ATTACKS[name].needs for name in ("deep-inversion", "dfme", "knockoff")] == [
        Access.WEIGHTS, Access.PROBS, Access.LABEL,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_student_is_returned_in_eval_mode_and_free_of_hooks(name: str, data: Split, victim: nn.Module) -> None:
    attack = ATTACKS[name]
    student = steal(attack, data, victim, Scenario(access=attack.needs))
    assert not any(layer.training or layer._forward_hooks for layer in student.modules())


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_withheld_classes_and_unknown_labels_leave_a_student_that_answers(
    name: str, labelled: bool, topk: int, data: Split, victim: nn.Module
) -> None:
    subset = data if labelled else data.without_labels()
    student = steal(ATTACKS[name], subset, victim, Scenario(access=Access.TOPK, topk=topk))
    assert predict_logits(student, data.x).isfinite().all()


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_of_an_undefended_victim_it_learns(name: str, labelled: bool, data: Split, victim: nn.Module) -> None:
    subset = data if labelled else data.without_labels()
    if name == "partial-kd":
        pytest.skip("a tenth of these images teaches little")
    student = steal(ATTACKS[name], subset, victim, Scenario(), epochs=20)
    assert accuracy(student, blobs().validation) > 0.85


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("name", ONCE)
def test_asking_once_costs_every_image_once(name: str, labelled: bool, data: Split, victim: nn.Module) -> None:
    attack = build(type(ATTACKS[name]), {**SMALL.get(name, {}), "queries": "once"}, name)
    subset = images_of(attack, data if labelled else data.without_labels())
    oracle = Oracle(undefended(victim), Scenario(), victim)
    attack.steal(oracle, context(subset, EPOCHS))
    assert oracle.answered == len(subset)


@pytest.mark.parametrize("name", [name for name in ONCE if name not in ("denoise", "kd-grid")])
def test_asking_about_augmentations_costs_every_image_in_every_epoch(name: str, data: Split, victim: nn.Module) -> None:
    attack = ATTACKS[name]
    oracle = Oracle(undefended(victim), Scenario(), victim)
    attack.steal(oracle, attacker(attack, data))
    assert oracle.answered == EPOCHS * len(attack.data_subset().of(data))


@pytest.mark.parametrize("name", ATTACKS)
def test_another_seed_gives_another_student(name: str, data: Split, victim: nn.Module) -> None:
    attack = ATTACKS[name]
    oracle = Oracle(undefended(victim), Scenario(access=attack.needs), victim)
    students = [attack.steal(oracle, attacker(attack, data, seed=seed)) for seed in (0, 1)]
    assert not equal(*students)


@pytest.mark.parametrize(
    "attack",
    [HTC(), SCM(models=("",)), Skeptical(delay=0.5), KDGrid(temperatures=(4.0, 1.0), alphas=(0.1,))],
    ids=lambda attack: type(attack).__name__,
)
def test_wrong_answers_that_fool_kd_do_not_fool_an_adaptive_attack(
    attack: Attack, data: Split, victim: nn.Module
) -> None:
    def shifted(x: Tensor) -> Tensor:
        return undefended(victim)(x).roll(1, dims=1)

    oracle = Oracle(shifted, Scenario(), victim)
    fooled, wary = (one.steal(oracle, context(data, epochs=20)) for one in (KD(), attack))
    assert accuracy(fooled, blobs().validation) < 0.1
    assert accuracy(wary, blobs().validation) > 0.9
