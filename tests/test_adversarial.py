"""Adversarial accuracy: exact where margins are known; only examples in the ball that the network misclassifies count."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchattacks
from simple_networks import (
    FAST,
    FULL,
    INVALID,
    LEVELS,
    RADIUS,
    Quadrants,
    beside,
    quadrant_images,
    served,
    under_attack,
)
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.evaluation.adversarial import Robustness


@pytest.mark.parametrize("robustness", [FAST, FULL], ids=["fast", "full"])
def test_an_attack_inside_the_margin_never_fools_and_one_beyond_it_always_does(robustness: Robustness) -> None:
    images = quadrant_images()
    inside = under_attack(Quadrants(), images, replace(robustness, eps=0.95 * RADIUS), 0)
    beyond = under_attack(Quadrants(), images, replace(robustness, eps=1.05 * RADIUS), 0)
    names = [name for name in inside if name.startswith("robust_")]
    assert len(names) == (2 if robustness is FAST else 4)
    assert all(inside[name] == 1.0 for name in names)
    sure = [name for name in names if name != "robust_square"]  # a random search may miss the one corner that fools
    assert all(beyond[name] == 0.0 for name in sure)


def test_adversarial_accuracy_counts_what_was_wrong_from_the_start_as_fooled() -> None:
    images = quadrant_images(10)
    images.y[:3] = (images.y[:3] + 1) % 4
    scores = under_attack(Quadrants(), images, replace(FULL, eps=0.9 * RADIUS), 0)
    assert (
        scores["robust_fgsm"]
        == scores["robust_pgd"]
        == scores["robust_square"]
        == scores["robust_autoattack"]
        == 7 / 10
    )
    assert scores["cw_success"] == 1.0  # of the seven


def test_nothing_classified_correctly_leaves_nothing_to_attack() -> None:
    images = quadrant_images()
    wrong = replace(images, y=(images.y + 1) % 4)
    expected = dict.fromkeys(["robust_fgsm", "robust_pgd", "robust_square", "robust_autoattack"], 0.0)
    assert under_attack(Quadrants(), wrong, FULL, 0) == expected
    assert beside(Quadrants(), served(Quadrants()), wrong, FAST)["transfer"] == 0.0


def test_huge_logits_mask_the_gradient_of_cross_entropy_and_not_that_of_level_full() -> None:
    """As after distillation at a high temperature: softmax has no gradient left. A known limit of FGSM and PGD."""
    scores = under_attack(Quadrants(scale=1e5), quadrant_images(), replace(FULL, eps=1.05 * RADIUS), 0)
    assert scores["robust_fgsm"] == scores["robust_pgd"] == 1.0
    assert scores["robust_autoattack"] == 0.0
    assert scores["cw_success"] == 1.0


@pytest.mark.parametrize("how", INVALID)
def test_examples_that_break_the_rules_do_not_count(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchattacks, "PGD", lambda model, **_: INVALID[how])
    images = quadrant_images()
    robustness = replace(FAST, eps=2.0) if how == "no image" else FAST  # inside the ball, but not in [0,1]
    assert under_attack(Quadrants(), images, robustness)["robust_pgd"] == 1.0
    assert beside(Quadrants(), served(Quadrants()), images, robustness)["transfer"] == 0.0


def test_an_attack_is_not_handed_an_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []

    def fools_all(x: Tensor, y: Tensor) -> Tensor:
        handed.append(len(x))
        return 1 - x

    for name in ("APGD", "APGDT", "FAB", "Square"):
        monkeypatch.setattr(torchattacks, name, lambda model, **_: fools_all)
    assert under_attack(Quadrants(), quadrant_images(), replace(FULL, eps=0.2))["robust_autoattack"] == 0.0
    assert handed == [12, 12]  # to Square by itself, and to the first of the sequence


def test_a_radius_is_kept_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step over the boundary counts when it lies in the ball, and does not when it is a little longer."""
    monkeypatch.setattr(torchattacks, "PGD", lambda model, **_: lambda x, y: x - 0.06 * (x - 0.5).sign())
    images = quadrant_images()
    assert under_attack(Quadrants(), images, replace(FAST, eps=0.06))["robust_pgd"] == 0.0
    assert under_attack(Quadrants(), images, replace(FAST, eps=0.05999))["robust_pgd"] == 1.0


def test_the_seed_reaches_the_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Tensor] = []

    def start(model: nn.Module, **_: object) -> Callable[[Tensor, Tensor], Tensor]:
        def attack(x: Tensor, y: Tensor) -> Tensor:
            started.append(torch.rand(4))
            return x

        return attack

    monkeypatch.setattr(torchattacks, "PGD", start)
    for seed in (0, 0, 1):
        under_attack(Quadrants(), quadrant_images(), FAST, seed)
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])


def test_images_in_channels_last_order_can_be_attacked() -> None:
    images = quadrant_images(channels=3)
    turned = replace(images, x=images.x.contiguous(memory_format=torch.channels_last))
    robustness = replace(FULL, eps=1.05 * RADIUS)
    assert under_attack(Quadrants(), turned, robustness, 0) == under_attack(Quadrants(), images, robustness, 0)


@pytest.mark.parametrize(
    ("field", "value"), [("eps", 0.0), ("eps", -0.1), ("pgd_steps", 0), ("cw_inset", 0.5), ("cw_inset", 0.0)]
)
def test_settings_that_make_no_attack_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(KdbenchError, match=f"Robustness.{field} must be"):
        replace(FAST, **{field: value})


def test_each_level_runs_the_attacks_of_the_one_below_and_more() -> None:
    run = [under_attack(Quadrants(), quadrant_images(), replace(FULL, level=level), 0).keys() for level in LEVELS]
    assert [len(names) for names in run] == [0, 2, 5, 6]
    assert all(low <= high for low, high in itertools.pairwise(run))


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KdbenchError, match=r"Robustness\.level must be 'none', 'fast', 'more' or 'full', not 'slow'"):
        Robustness(level="slow")  # type: ignore[arg-type]
