"""Preflight: networks that cannot take the images of a suite are found before any of them is trained."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdbench.api import Access, KdbenchError
from kdbench.runs.session import Session
from kdbench.suites.preflight import try_networks
from kdbench.suites.suite import Suite
from runs import ONE_CELL, Json, RecordedProgress, options

BLOBS = (1, 8, 8)
CLASSES = 3
LARGE = "distillation-mnist"  # a network that needs 16x16 pixels
TOO_SMALL = f"The network '{LARGE}' needs images of 16x16 or more, not 8x8."
ODD = """
from torch import nn
from torch.nn import Flatten, Linear, Sequential

def flat(shape, classes):
    return Sequential(Flatten(), Linear(16, classes))

def binary(shape, classes):
    return Sequential(Flatten(), Linear(64, 2))

class Talker(nn.Module):
    def forward(self, x):
        return x, "a picture"

def talker(shape, classes):
    return Talker()
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's networks that no suite can use."""
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "odd", raising=False)


def refusal(suite: Suite) -> str:
    with pytest.raises(KdbenchError) as caught:
        try_networks(suite, BLOBS, CLASSES)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"victim.network": LARGE}, "victim.network"),
        ({"student.networks": ["mini-8", LARGE]}, "student.networks"),
        ({"attacks": ["assistant-kd"], "attack.assistant-kd.chain": [LARGE, ""]}, "attack.assistant-kd"),
    ],
)
def test_a_network_for_larger_images_is_named_with_its_field(
    tiny: Callable[..., Suite], changes: Json, field: str
) -> None:
    assert refusal(tiny(changes)) == f"{field}: {TOO_SMALL}"
    try_networks(tiny(changes), (1, 28, 28), CLASSES)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("flat", "cannot take images of 1x8x8 (RuntimeError: "),
        ("binary", "answers 2 images of 1x8x8 with (2, 2), not (2, 3)."),
        ("talker", "answers 2 images of 1x8x8 with a tuple, not (2, 3)."),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("odd")
def test_what_a_users_network_does_is_said(tiny: Callable[..., Suite], function: str, said: str) -> None:
    found = refusal(tiny({"victim.network": f"odd:{function}"}))
    assert found.startswith(f"victim.network: The network 'odd:{function}' {said}")


def test_networks_of_an_attack_that_is_skipped_are_not_tried(tiny: Callable[..., Suite]) -> None:
    suite = tiny({"attacks": ["assistant-kd"], "attack.assistant-kd.chain": [LARGE]})
    try_networks(replace(suite, scenario=replace(suite.scenario, access=Access.NOTHING)), BLOBS, CLASSES)


def test_a_preflight_leaves_the_global_generator_as_it_was(tiny: Callable[..., Suite]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    try_networks(tiny(), BLOBS, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_of_a_network_that_cannot_take_the_images_is_refused_before_any_training(
    tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    progress_display = RecordedProgress()
    with pytest.raises(KdbenchError) as caught:
        Session(tiny({**ONE_CELL, "victim.network": LARGE}), options(tmp_path), progress_display).run()
    assert str(caught.value) == f"victim.network: {TOO_SMALL}"
    assert progress_display.titles == ["read blobs"]
    assert not (tmp_path / "out").exists()
