"""Transfer: examples made on the student count when the served victim misclassifies them."""

from dataclasses import replace

import torch
from simple_networks import FAST, NONE, RADIUS, Quadrants, beside, quadrant_images, served, under_attack
from torch import Tensor

from kdbench.evaluation.predictions import BATCH
from kdbench.game.data import Split


def test_examples_that_fool_a_copy_fool_the_victim_itself() -> None:
    images = quadrant_images()
    copied = beside(Quadrants(), served(Quadrants()), images, replace(FAST, eps=1.1 * RADIUS))
    weak = beside(Quadrants(), served(Quadrants()), images, replace(FAST, eps=0.9 * RADIUS))
    assert copied == {"fidelity": 1.0, "transfer": 1.0}
    assert weak == {"fidelity": 1.0, "transfer": 0.0}


def test_examples_do_not_transfer_to_a_victim_that_uses_other_pixels() -> None:
    images = quadrant_images(channels=2)
    scores = beside(Quadrants(channel=1), served(Quadrants()), images, replace(FAST, eps=1.1 * RADIUS))
    assert scores == {"fidelity": 1.0, "transfer": 0.0}


def test_transfer_leaves_out_what_the_victim_gets_wrong_anyway() -> None:
    images = quadrant_images(8)
    images.y[:2] = (images.y[:2] + 1) % 4
    near = images.take(torch.arange(5))
    far = replace(near, x=0.5 + 2 * (near.x - 0.5))  # margin doubled: out of reach
    both = Split(torch.cat([images.x, far.x]), torch.cat([images.y, far.y]), 4)
    metrics = beside(Quadrants(), served(Quadrants()), both, replace(FAST, eps=1.1 * RADIUS))
    assert metrics["transfer"] == 6 / 9  # of 13 images the victim gets 2 + 2 wrong, and 6 of the rest are in reach


def test_a_service_is_asked_in_bounded_batches_and_about_each_clean_image_once() -> None:
    asked: list[int] = []

    def service(x: Tensor) -> Tensor:
        asked.append(len(x))
        answers: Tensor = Quadrants()(x)
        return answers

    images = quadrant_images(BATCH + 3)
    beside(Quadrants(), service, images, FAST)
    assert max(asked) <= BATCH
    assert sum(asked) == 2 * len(images)  # once as they are, once as adversarial examples


def test_level_none_attacks_nothing() -> None:
    images = quadrant_images()
    assert under_attack(Quadrants(), images, NONE) == {}
    assert beside(Quadrants(), served(Quadrants()), images, NONE) == {"fidelity": 1.0}
