"""C&W: its norm is the distance to the boundary, and shifts of the logits or pixels at 0 and 1 do not stop it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torchattacks
from simple_networks import FULL, INVALID, RADIUS, Affine, Quadrants, quadrant_images, under_attack

from kdbench.evaluation.adversarial import Robustness
from kdbench.game.data import Split


def test_the_norm_of_carlini_and_wagner_is_the_distance_to_the_boundary() -> None:
    scores = under_attack(Quadrants(), quadrant_images(), FULL, 0)
    distance = 2 * RADIUS / 0.5**0.5  # margin of the logits / L2 norm of the difference of their weights
    assert scores["cw_success"] == 1.0
    assert distance <= scores["cw_l2"] <= 1.1 * distance


@pytest.mark.parametrize(("level", "push"), [(0.0, 1.0), (1.0, -1.0)], ids=["zero", "one"])
def test_carlini_and_wagner_moves_pixels_at_the_edge_of_the_range(level: float, push: float) -> None:
    """All pixels lie at the edge, and only moving them far inwards changes the label."""
    model = Affine(torch.stack([torch.zeros(16), torch.full((16,), push / 16)]) * 10, torch.tensor([3.0, 0.0]))
    model.bias.data[1] -= 10 * push * level
    images = Split(torch.full((2, 1, 4, 4), level), torch.zeros(2, dtype=torch.long), 2)
    scores = under_attack(model, images, Robustness(level="full", cw_c=10.0), 0)
    assert scores["cw_success"] == 1.0
    assert scores["cw_l2"] >= 0.3 * 4  # every one of 16 pixels by 0.3


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_constant_added_to_all_logits_does_not_stop_carlini_and_wagner(shift: float) -> None:
    images = quadrant_images()
    plain, shifted = (under_attack(Quadrants(shift=s), images, FULL, 0) for s in (0.0, shift))
    assert shifted["cw_success"] == plain["cw_success"] == 1.0
    assert shifted["cw_l2"] == pytest.approx(plain["cw_l2"], rel=1e-3)


@pytest.mark.parametrize("how", ["no image", "not a number", "the image itself"])
def test_results_of_carlini_and_wagner_that_break_the_rules_do_not_count(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchattacks, "CW", lambda model, **_: INVALID[how])
    scores = under_attack(Quadrants(), quadrant_images(), FULL, 0)
    assert scores["cw_success"] == 0.0
    assert "cw_l2" not in scores


@pytest.mark.parametrize("level", ["none", "fast"])
def test_it_is_not_run_below_the_level_more(level: Any) -> None:
    assert not {"cw_success", "cw_l2"} & under_attack(Quadrants(), quadrant_images(), replace(FULL, level=level)).keys()
