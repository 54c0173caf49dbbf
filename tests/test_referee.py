"""The referee counts exactly, judges attacks itself, and leaves everything as it found it."""

import copy
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.evaluation.accuracy import evaluate_against, evaluate_student, evaluate_victim
from kdbench.evaluation.adversarial import BATCH, Robustness, adversarial, frozen_in_eval_mode, sensitivity, transfer
from kdbench.game.data import Images, Split
from kdbench.game.methods import Context, Recipe
from kdbench.game.roles import seeded
from kdbench.game.threat import keep_top
from kdbench.records import METRICS
from kdbench.training.fit import fit
from kdbench.zoo.datasets import Blobs
from kdbench.zoo.networks import mini_8

NONE, FAST = Robustness(level="none"), Robustness()
LEVELS: tuple[Literal["none", "fast", "more", "full"], ...] = ("none", "fast", "more", "full")
FULL = Robustness(
    level="full", autoattack_steps=10, autoattack_queries=200, square_queries=200
)  # the published numbers, cut to seconds
RADIUS = 0.05


class Quadrants(nn.Module):
    """A linear net on images Cx4x4 for four classes: the logit of a class is `scale` times the mean of its quadrant.

    Quadrants differ in one class minus another by a weight of L1 norm 2 and squared L2 norm 1/2 (times scale).
    """

    def __init__(self, channel: int = 0, scale: float = 10.0, shift: float = 0.0) -> None:
        super().__init__()
        self.channel, self.shift = channel, shift
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        quadrants = F.avg_pool2d(x[:, self.channel : self.channel + 1], 2).flatten(1)
        return self.scale * quadrants + self.shift


class Affine(nn.Module):
    """Logits W x + b for images of any shape; `weight` (K,pixels), `bias` (K,)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def quadrant_images(count: int = 12, radius: float = RADIUS, channels: int = 1) -> Split:
    """Images whose own quadrant lies `radius` above mid-grey and the others below: the L-inf margin is `radius`."""
    y = torch.arange(count) % 4
    own = F.one_hot(y, 4).reshape(-1, 1, 2, 2).float()
    x = 0.5 + radius * (2 * own - 1)
    return Split(x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, channels, 1, 1), y, 4)


def as_images(test: Split) -> Images:
    return Images(test, test, test)


def served(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).log_softmax(dim=1)


def constant(classes: int = 3, pixels: int = 64) -> nn.Module:
    """Always answers class 0."""
    return Affine(torch.zeros(classes, pixels), F.one_hot(torch.tensor(0), classes).float())


@pytest.fixture
def blobs() -> Images:
    return Blobs().load(Path())


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A net with batch norm that has learnt the blobs."""
    with seeded(3):
        net = mini_8((1, 8, 8), 3)
    data = Blobs().load(Path()).train
    ctx = Context(data, Recipe(batch=32), "cpu", 0, lambda name=None: net, torch.Generator().manual_seed(0))
    fit(net, F.cross_entropy, data.x, data.y, ctx)
    return net


@pytest.fixture
def net(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def test_accuracy_is_a_count_over_all_images_also_when_the_last_batch_is_short() -> None:
    images = quadrant_images(BATCH + 1)
    images.y[-1] = (images.y[-1] + 1) % 4  # alone in its batch and wrong: a mean of batch means would say 1/2
    expected = BATCH / (BATCH + 1)
    student = evaluate_student(Quadrants(), as_images(images), NONE, 0)
    victim = evaluate_victim(Quadrants(), served(Quadrants()), as_images(images), NONE, 0)
    assert accuracies(student) == {"student_acc": expected, "student_val_acc": expected}
    assert accuracies(victim) == {"victim_acc": expected, "victim_val_acc": expected}


def test_test_and_validation_images_are_not_mixed_up() -> None:
    test, validation = quadrant_images(8), quadrant_images(5)
    validation = replace(validation, y=torch.zeros_like(validation.y))  # classes 0 1 2 3 0: right twice
    images = Images(quadrant_images(4), validation, test)
    student = evaluate_student(Quadrants(), images, NONE, 0)
    assert accuracies(student) == {"student_acc": 1.0, "student_val_acc": 2 / 5}
    victim = evaluate_victim(Quadrants(), served(Quadrants()), images, NONE, 0)
    assert accuracies(victim) == {"victim_acc": 1.0, "victim_val_acc": 2 / 5}


def accuracies(scores: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if name.endswith("_acc")}


def test_what_a_truthful_service_releases_is_the_models_own_and_repeats_itself() -> None:
    images = as_images(quadrant_images(40))
    scores = evaluate_victim(Quadrants(scale=0.0), served(Quadrants(scale=0.0)), images, NONE, 0)
    assert scores["victim_consistency"] == 1.0
    assert scores["victim_distortion"] == 0.0
    assert scores["victim_entropy"] == pytest.approx(math.log(4))
    assert scores["victim_parameters"] == 1


def test_labels_alone_have_no_entropy_and_lie_as_far_from_the_answers_as_their_other_classes_weigh() -> None:
    model = Quadrants(scale=0.0)
    scores = evaluate_victim(
        model, lambda x: keep_top(model(x).log_softmax(1), 1), as_images(quadrant_images()), NONE, 0
    )
    assert scores["victim_entropy"] == 0.0
    assert scores["victim_distortion"] == pytest.approx(2 * 3 / 4)


def test_answers_that_change_with_every_question_are_noticed() -> None:
    draws = torch.Generator().manual_seed(0)

    def moody(x: Tensor) -> Tensor:
        return torch.randn(len(x), 4, generator=draws).log_softmax(dim=1)

    def by_place(x: Tensor) -> Tensor:
        return torch.eye(len(x), 4).add(0.1).log().log_softmax(dim=1)

    images = as_images(quadrant_images())
    assert evaluate_victim(Quadrants(), moody, images, NONE, 0)["victim_consistency"] == 0.0
    assert evaluate_victim(Quadrants(), by_place, images, NONE, 0)["victim_consistency"] < 1.0


def test_a_constant_net_is_right_by_chance_and_cannot_be_fooled(blobs: Images) -> None:
    scores = evaluate_student(constant(), blobs, Robustness(level="full"), 0)
    assert scores == {
        "student_acc": 1 / 3,
        "student_val_acc": 1 / 3,
        "student_adv_fgsm": 1 / 3,
        "student_adv_pgd": 1 / 3,
        "student_adv_square": 1 / 3,
        "student_parameters": 3 * 64 + 3,
        "student_cw_success": 0.0,  # and no norm of what was not felled
        "student_sensitivity": 0.0,
    }


def test_no_images_to_judge_on_is_the_users_mistake() -> None:
    with pytest.raises(KdbenchError, match="no images to judge on"):
        evaluate_student(Quadrants(), as_images(quadrant_images(0)), FAST, 0)


def test_a_service_is_asked_in_bounded_batches_and_about_each_clean_image_once() -> None:
    asked: list[int] = []

    def service(x: Tensor) -> Tensor:
        asked.append(len(x))
        answers: Tensor = Quadrants()(x)
        return answers

    images = quadrant_images(BATCH + 3)
    evaluate_against(Quadrants(), service, as_images(images), FAST, 0)
    assert max(asked) <= BATCH
    assert sum(asked) == 2 * len(images)  # once as they are, once as adversarial examples


def test_a_victim_is_scored_as_served_and_attacked_as_hardened() -> None:
    images = quadrant_images()
    scores = evaluate_victim(
        Quadrants(), served(constant(4, 16)), as_images(images), replace(FAST, eps=0.9 * RADIUS), 0
    )
    assert scores["victim_acc"] == 1 / 4
    assert scores["victim_adv_fgsm"] == scores["victim_adv_pgd"] == 1.0


@pytest.mark.parametrize("robustness", [FAST, FULL], ids=["fast", "full"])
def test_an_attack_inside_the_margin_never_fools_and_one_beyond_it_always_does(robustness: Robustness) -> None:
    images = quadrant_images()
    inside = adversarial(Quadrants(), images, replace(robustness, eps=0.95 * RADIUS), 0)
    beyond = adversarial(Quadrants(), images, replace(robustness, eps=1.05 * RADIUS), 0)
    names = [name for name in inside if name.startswith("adv_")]
    assert len(names) == (2 if robustness is FAST else 4)
    assert all(inside[name] == 1.0 for name in names)
    sure = [name for name in names if name != "adv_square"]  # a random search may miss the one corner that fools
    assert all(beyond[name] == 0.0 for name in sure)


def test_adversarial_accuracy_counts_what_was_wrong_from_the_start_as_fooled() -> None:
    images = quadrant_images(10)
    images.y[:3] = (images.y[:3] + 1) % 4
    scores = adversarial(Quadrants(), images, replace(FULL, eps=0.9 * RADIUS), 0)
    assert scores["adv_fgsm"] == scores["adv_pgd"] == scores["adv_square"] == scores["adv_autoattack"] == 7 / 10
    assert scores["cw_success"] == 1.0  # of the seven


def test_a_wider_ball_leaves_fewer_standing(net: nn.Module, blobs: Images) -> None:
    near, far = (evaluate_student(net, blobs, replace(FAST, eps=eps), 0) for eps in (2 / 255, 64 / 255))
    assert near["student_acc"] == far["student_acc"] > 0.9
    assert 0 <= far["student_adv_pgd"] < near["student_adv_pgd"] <= near["student_acc"]
    assert 0 <= far["student_adv_fgsm"] < near["student_adv_fgsm"] <= near["student_acc"]


def test_nothing_classified_rightly_leaves_nothing_to_attack() -> None:
    images = quadrant_images()
    wrong = replace(images, y=(images.y + 1) % 4)
    expected = dict.fromkeys(["adv_fgsm", "adv_pgd", "adv_square", "adv_autoattack"], 0.0)
    assert adversarial(Quadrants(), wrong, FULL, 0) == expected
    assert transfer(Quadrants(), served(Quadrants()), wrong, FAST, 0) == 0.0


def test_the_norm_of_carlini_and_wagner_is_the_distance_to_the_boundary() -> None:
    scores = adversarial(Quadrants(), quadrant_images(), FULL, 0)
    distance = 2 * RADIUS / 0.5**0.5  # margin of the logits / L2 norm of the difference of their weights
    assert scores["cw_success"] == 1.0
    assert distance <= scores["cw_l2"] <= 1.1 * distance


@pytest.mark.parametrize(("level", "push"), [(0.0, 1.0), (1.0, -1.0)], ids=["zero", "one"])
def test_carlini_and_wagner_moves_pixels_at_the_edge_of_the_range(level: float, push: float) -> None:
    """All pixels lie at the edge, and only moving them far inwards changes the label."""
    model = Affine(torch.stack([torch.zeros(16), torch.full((16,), push / 16)]) * 10, torch.tensor([3.0, 0.0]))
    model.bias.data[1] -= 10 * push * level
    images = Split(torch.full((2, 1, 4, 4), level), torch.zeros(2, dtype=torch.long), 2)
    scores = adversarial(model, images, Robustness(level="full", cw_c=10.0), 0)
    assert scores["cw_success"] == 1.0
    assert scores["cw_l2"] >= 0.3 * 4  # every one of 16 pixels by 0.3


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_constant_added_to_all_logits_does_not_stop_carlini_and_wagner(shift: float) -> None:
    images = quadrant_images()
    plain, shifted = (adversarial(Quadrants(shift=s), images, FULL, 0) for s in (0.0, shift))
    assert shifted["cw_success"] == plain["cw_success"] == 1.0
    assert shifted["cw_l2"] == pytest.approx(plain["cw_l2"], rel=1e-3)


def test_huge_logits_hide_from_cross_entropy_and_not_from_level_full() -> None:
    """As after distillation at a high temperature: softmax has no gradient left. A known limit of FGSM and PGD."""
    scores = adversarial(Quadrants(scale=1e5), quadrant_images(), replace(FULL, eps=1.05 * RADIUS), 0)
    assert scores["adv_fgsm"] == scores["adv_pgd"] == 1.0
    assert scores["adv_autoattack"] == 0.0
    assert scores["cw_success"] == 1.0


def test_autoattack_is_left_out_where_its_loss_is_not_defined(net: nn.Module, blobs: Images) -> None:
    scores = evaluate_student(net, blobs, FULL, 0)
    assert "student_adv_autoattack" not in scores
    assert {"student_adv_pgd", "student_cw_success", "student_cw_l2"} <= scores.keys()


def test_level_none_attacks_nothing() -> None:
    images = as_images(quadrant_images())
    assert adversarial(Quadrants(), images.test, NONE, 0) == {}
    assert evaluate_against(Quadrants(), served(Quadrants()), images, NONE, 0) == {"fidelity": 1.0}


CHEATS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "outside the ball": lambda x, y: 1 - x,
    "no image": lambda x, y: 0.5 - 20 * (x - 0.5),
    "not a number": lambda x, y: torch.full_like(x, torch.nan),
    "the image itself": lambda x, y: x.clone(),
}


@pytest.mark.parametrize("how", CHEATS)
def test_what_breaks_the_rules_fells_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchattacks, "PGD", lambda model, **_: CHEATS[how])
    images = quadrant_images()
    robustness = replace(FAST, eps=2.0) if how == "no image" else FAST  # inside the ball, but not in [0,1]
    assert adversarial(Quadrants(), images, robustness, 0)["adv_pgd"] == 1.0
    assert transfer(Quadrants(), served(Quadrants()), images, robustness, 0) == 0.0


@pytest.mark.parametrize("how", ["no image", "not a number", "the image itself"])
def test_carlini_and_wagner_is_judged_too(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchattacks, "CW", lambda model, **_: CHEATS[how])
    scores = adversarial(Quadrants(), quadrant_images(), FULL, 0)
    assert scores["cw_success"] == 0.0
    assert "cw_l2" not in scores


def test_an_attack_is_not_handed_an_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []

    def fells_all(x: Tensor, y: Tensor) -> Tensor:
        handed.append(len(x))
        return 1 - x

    for name in ("APGD", "APGDT", "FAB", "Square"):
        monkeypatch.setattr(torchattacks, name, lambda model, **_: fells_all)
    assert adversarial(Quadrants(), quadrant_images(), replace(FULL, eps=0.2), 0)["adv_autoattack"] == 0.0
    assert handed == [12, 12]  # to Square by itself, and to the first of the sequence


def test_a_radius_is_kept_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step over the boundary counts when it lies in the ball, and does not when it is a little longer."""
    monkeypatch.setattr(torchattacks, "PGD", lambda model, **_: lambda x, y: x - 0.06 * (x - 0.5).sign())
    images = quadrant_images()
    assert adversarial(Quadrants(), images, replace(FAST, eps=0.06), 0)["adv_pgd"] == 0.0
    assert adversarial(Quadrants(), images, replace(FAST, eps=0.05999), 0)["adv_pgd"] == 1.0


def test_examples_that_fool_a_copy_fool_the_victim_itself() -> None:
    images = quadrant_images()
    copied = evaluate_against(Quadrants(), served(Quadrants()), as_images(images), replace(FAST, eps=1.1 * RADIUS), 0)
    weak = evaluate_against(Quadrants(), served(Quadrants()), as_images(images), replace(FAST, eps=0.9 * RADIUS), 0)
    assert copied == {"fidelity": 1.0, "transfer": 1.0}
    assert weak == {"fidelity": 1.0, "transfer": 0.0}


def test_examples_do_not_carry_over_to_a_victim_that_looks_elsewhere() -> None:
    images = quadrant_images(channels=2)
    scores = evaluate_against(
        Quadrants(channel=1), served(Quadrants()), as_images(images), replace(FAST, eps=1.1 * RADIUS), 0
    )
    assert scores == {"fidelity": 1.0, "transfer": 0.0}


def test_transfer_leaves_out_what_the_victim_gets_wrong_anyway() -> None:
    images = quadrant_images(8)
    images.y[:2] = (images.y[:2] + 1) % 4
    near = images.take(torch.arange(5))
    far = replace(near, x=0.5 + 2 * (near.x - 0.5))  # margin doubled: out of reach
    both = Split(torch.cat([images.x, far.x]), torch.cat([images.y, far.y]), 4)
    share = transfer(Quadrants(), served(Quadrants()), both, replace(FAST, eps=1.1 * RADIUS), 0)
    assert share == 6 / 9  # 13 images, of which the victim gets 2 + 2 wrong; 6 of the rest are in reach


def test_agreement_counts_equal_labels_right_or_wrong() -> None:
    images = quadrant_images(7)
    images = replace(images, y=(images.y + 1) % 4)  # the victim is never right
    scores = evaluate_against(constant(4, 16), served(Quadrants()), as_images(images), NONE, 0)
    assert scores == {"fidelity": 2 / 7}


def test_the_sensitivity_of_a_linear_net_is_the_mean_size_of_its_summed_weights() -> None:
    weight = torch.randn(5, 2 * 3 * 3, generator=torch.Generator().manual_seed(0))
    x = torch.rand(BATCH + 7, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    expected = float(weight.sum(dim=0).abs().mean())
    assert sensitivity(Affine(weight, torch.zeros(5)), x) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("robustness", [FAST, FULL], ids=["fast", "full"])
def test_same_seed_same_numbers_whatever_was_drawn_before(
    robustness: Robustness, net: nn.Module, blobs: Images
) -> None:
    def all_scores() -> dict[str, float]:
        return evaluate_student(net, blobs, robustness, 5) | evaluate_against(net, served(net), blobs, robustness, 5)

    first = all_scores()
    torch.rand(7)
    assert all_scores() == first


def test_the_seed_reaches_the_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Tensor] = []

    def start(model: nn.Module, **_: object) -> Callable[[Tensor, Tensor], Tensor]:
        def attack(x: Tensor, y: Tensor) -> Tensor:
            started.append(torch.rand(4))
            return x

        return attack

    monkeypatch.setattr(torchattacks, "PGD", start)
    for seed in (0, 0, 1):
        adversarial(Quadrants(), quadrant_images(), FAST, seed)
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])


def test_a_fuller_examination_does_not_move_the_numbers_of_the_faster_one(net: nn.Module, blobs: Images) -> None:
    fast, full = (evaluate_student(net, blobs, robustness, 0) for robustness in (FAST, FULL))
    assert fast.items() <= full.items()


def test_random_generators_are_left_as_they_were() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    evaluate_student(Quadrants(), as_images(quadrant_images()), FULL, 0)
    evaluate_against(Quadrants(), served(Quadrants()), as_images(quadrant_images()), FULL, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]  # noqa: NPY002


def test_a_net_is_left_as_it_was_found(net: nn.Module, blobs: Images) -> None:
    """In part training, in part frozen; its weights, batch statistics and gradients untouched."""
    net.train()
    net.get_submodule("features.1").eval()
    next(net.parameters()).requires_grad_(False)

    def state() -> list[object]:
        modes = [module.training for module in net.modules()]
        return [modes, *((p.requires_grad, p.grad) for p in net.parameters())]

    before, weights = state(), {name: value.clone() for name, value in net.state_dict().items()}
    evaluate_student(net, blobs, FULL, 0)
    evaluate_victim(net, served(constant()), blobs, FULL, 0)
    evaluate_against(net, served(constant()), blobs, FULL, 0)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_a_net_is_judged_in_eval_mode_whatever_mode_it_comes_in(net: nn.Module, blobs: Images) -> None:
    expected = evaluate_student(net.eval(), blobs, FULL, 0)
    assert evaluate_student(net.train(), blobs, FULL, 0) == expected


def test_a_net_is_put_back_when_an_attack_breaks() -> None:
    model = Quadrants().train()

    def breaks() -> None:
        with frozen_in_eval_mode(model):
            assert not model.training
            assert not model.scale.requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert model.training
    assert model.scale.requires_grad


def test_images_in_channels_last_order_can_be_attacked() -> None:
    images = quadrant_images(channels=3)
    turned = replace(images, x=images.x.contiguous(memory_format=torch.channels_last))
    robustness = replace(FULL, eps=1.05 * RADIUS)
    assert adversarial(Quadrants(), turned, robustness, 0) == adversarial(Quadrants(), images, robustness, 0)


def test_every_score_has_its_place_in_a_cells_record() -> None:
    images = as_images(quadrant_images())
    names = evaluate_student(Quadrants(), images, FULL, 0).keys()
    scored = {name.replace("student_", "victim_") for name in names if name not in METRICS}
    named_likewise = {"victim_adv_pgd", "victim_adv_square", "victim_adv_autoattack"}
    assert scored - named_likewise <= METRICS.keys()
    assert evaluate_victim(Quadrants(), served(Quadrants()), images, FULL, 0).keys() - named_likewise <= METRICS.keys()
    assert evaluate_against(Quadrants(), served(Quadrants()), images, FULL, 0).keys() <= METRICS.keys()


@pytest.mark.parametrize(
    ("field", "value"), [("eps", 0.0), ("eps", -0.1), ("pgd_steps", 0), ("cw_inset", 0.5), ("cw_inset", 0.0)]
)
def test_values_that_make_no_attack_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(KdbenchError, match=f"Robustness.{field} must be"):
        replace(FAST, **{field: value})


def test_each_level_tries_what_the_one_below_tries_and_more() -> None:
    tried = [adversarial(Quadrants(), quadrant_images(), replace(FULL, level=level), 0).keys() for level in LEVELS]
    assert [len(names) for names in tried] == [0, 2, 5, 6]
    assert all(low <= high for low, high in itertools.pairwise(tried))


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KdbenchError, match=r"Evasion\.level must be 'none', 'fast', 'more' or 'full', not 'slow'"):
        Robustness(level="slow")  # type: ignore[arg-type]
