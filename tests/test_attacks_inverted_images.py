"""DeepInversion: what it asks, and what a student of its images learns."""

from dataclasses import replace

import pytest
import torch
from inversions import ADAPTIVE, EPOCHS, SMALL, attacker, name, oracle_on
from torch import nn

from helpers import S, T, accuracy, blobs, context, taught
from kdbench.api import (
    Access,
    Refused,
    Split,
    soften,
)
from kdbench.attacks.deep_inversion import DeepInversion


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


def test_the_student_of_an_inversion_learns_by_the_kl_alone() -> None:
    divergence = float((soften(T, 3.0) * (soften(T, 3.0) / soften(S, 3.0)).log()).sum())
    assert float(DeepInversion().loss(S, T)) == pytest.approx(9 * divergence, abs=1e-12)


# DeepInversion: the attack run


@pytest.mark.parametrize("attack", [SMALL, ADAPTIVE], ids=name)
def test_the_inversion_owns_no_image_and_needs_the_weights(
    attack: DeepInversion, data: Split, victim: nn.Module
) -> None:
    assert attack.needs is Access.WEIGHTS
    assert len(attacker(attack, data).data) == 0
    with pytest.raises(Refused, match="asked for the weights"):
        attack.steal(oracle_on(victim, Access.PROBS), attacker(attack, data))


def test_the_inversion_asks_once_about_each_image_or_about_each_augmented_batch(data: Split, victim: nn.Module) -> None:
    def asked(attack: DeepInversion) -> int:
        oracle = oracle_on(victim)
        attack.steal(oracle, attacker(attack, data))
        return oracle.answered

    taught_images = 2 * ADAPTIVE.steps * 32  # three batches of images, recipe batches before each but the first
    assert asked(SMALL) == asked(ADAPTIVE) == SMALL.images
    assert asked(replace(SMALL, queries="augmented")) == EPOCHS * SMALL.images
    assert asked(replace(ADAPTIVE, queries="augmented")) == EPOCHS * SMALL.images + taught_images


@pytest.mark.parametrize("attack", [SMALL, ADAPTIVE], ids=name)
def test_what_is_asked_once_is_asked_about_the_images_that_are_learnt(
    attack: DeepInversion, data: Split, victim: nn.Module
) -> None:
    asking = (attack, replace(attack, queries="augmented"))
    one, two = (a.steal(oracle_on(victim), attacker(a, data)) for a in asking)
    for ours, theirs in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # the recipe augments nothing: the same answers


@pytest.mark.parametrize("competition", [0.0, 1.0])
def test_a_student_of_inverted_images_knows_the_real_ones(competition: float, data: Split, victim: nn.Module) -> None:
    attack = DeepInversion(
        images=192, batch=96, iterations=60, lr=0.2, jitter=0, competition=competition, steps=5, queries="once"
    )
    ctx = context(attack.data_subset().of(data), epochs=15)
    assert accuracy(attack.steal(oracle_on(victim), ctx), blobs().validation) > 0.6  # chance: 0.33
