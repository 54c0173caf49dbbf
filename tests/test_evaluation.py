"""Evaluation counts exactly, draws from its seed alone, and leaves networks and generators as they were."""

import copy
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from simple_networks import (
    FAST,
    FULL,
    NONE,
    RADIUS,
    Affine,
    Quadrants,
    as_images,
    beside,
    constant,
    quadrant_images,
    served,
)
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.evaluation.adversarial import Robustness
from kdbench.evaluation.evaluate import evaluate_against, evaluate_student, evaluate_victim
from kdbench.evaluation.network import EvaluatedNetwork, frozen_in_eval_mode
from kdbench.evaluation.predictions import BATCH, predict_labels
from kdbench.evaluation.sensitivity import sensitivity
from kdbench.game.data import Images
from kdbench.game.methods import Context, Recipe
from kdbench.game.roles import seeded
from kdbench.game.threat import keep_top
from kdbench.metrics import METRICS
from kdbench.training.fit import fit
from kdbench.zoo.datasets import Blobs
from kdbench.zoo.networks import mini_8

# Every attack of the highest level, in few steps: for tests of what an evaluation leaves unchanged.
SHORT = replace(FULL, pgd_steps=5, cw_steps=40, autoattack_steps=3, autoattack_queries=20, square_queries=20)


@pytest.fixture
def blobs() -> Images:
    return Blobs().load(Path())


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network with batch norm, trained on blobs."""
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
    student = evaluate_student(Quadrants(), as_images(images), NONE, 0).metrics
    victim = evaluate_victim(Quadrants(), served(Quadrants()), as_images(images), NONE, 0).metrics
    assert accuracies(student) == {"student_acc": expected, "student_val_acc": expected}
    assert accuracies(victim) == {"victim_acc": expected, "victim_val_acc": expected}


def test_test_and_validation_images_are_not_mixed_up() -> None:
    test, validation = quadrant_images(8), quadrant_images(5)
    validation = replace(validation, y=torch.zeros_like(validation.y))  # classes 0 1 2 3 0: right twice
    images = Images(quadrant_images(4), validation, test)
    student = evaluate_student(Quadrants(), images, NONE, 0).metrics
    assert accuracies(student) == {"student_acc": 1.0, "student_val_acc": 2 / 5}
    victim = evaluate_victim(Quadrants(), served(Quadrants()), images, NONE, 0).metrics
    assert accuracies(victim) == {"victim_acc": 1.0, "victim_val_acc": 2 / 5}


def accuracies(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.endswith("_acc")}


def test_an_undefended_service_releases_the_models_own_answers_and_repeats_them() -> None:
    images = as_images(quadrant_images(40))
    scores = evaluate_victim(Quadrants(scale=0.0), served(Quadrants(scale=0.0)), images, NONE, 0).metrics
    assert scores["victim_consistency"] == 1.0
    assert scores["victim_distortion"] == 0.0
    assert scores["victim_entropy"] == pytest.approx(math.log(4))
    assert scores["victim_parameters"] == 1


def test_labels_alone_have_no_entropy_and_a_distortion_of_twice_the_other_classes_probability() -> None:
    model = Quadrants(scale=0.0)
    service = lambda x: keep_top(model(x).log_softmax(1), 1)  # noqa: E731
    scores = evaluate_victim(model, service, as_images(quadrant_images()), NONE, 0).metrics
    assert scores["victim_entropy"] == 0.0
    assert scores["victim_distortion"] == pytest.approx(2 * 3 / 4)


def test_answers_that_change_with_every_query_are_inconsistent() -> None:
    draws = torch.Generator().manual_seed(0)

    def random(x: Tensor) -> Tensor:
        return torch.randn(len(x), 4, generator=draws).log_softmax(dim=1)

    def by_position(x: Tensor) -> Tensor:
        return torch.eye(len(x), 4).add(0.1).log().log_softmax(dim=1)

    images = as_images(quadrant_images())
    assert evaluate_victim(Quadrants(), random, images, NONE, 0).metrics["victim_consistency"] == 0.0
    assert evaluate_victim(Quadrants(), by_position, images, NONE, 0).metrics["victim_consistency"] < 1.0


def test_a_constant_network_is_right_by_chance_and_cannot_be_fooled(blobs: Images) -> None:
    scores = evaluate_student(constant(), blobs, Robustness(level="full"), 0).metrics
    assert scores == {
        "student_acc": 1 / 3,
        "student_val_acc": 1 / 3,
        "student_robust_fgsm": 1 / 3,
        "student_robust_pgd": 1 / 3,
        "student_robust_square": 1 / 3,
        "student_parameters": 3 * 64 + 3,
        "student_cw_success": 0.0,  # and no norm, as nothing was misclassified
        "student_sensitivity": 0.0,
    }


def test_no_images_to_evaluate_on_is_the_users_mistake() -> None:
    with pytest.raises(KdbenchError, match="no images to evaluate on"):
        evaluate_student(Quadrants(), as_images(quadrant_images(0)), FAST, 0)


def test_the_accuracy_of_a_victim_is_the_services_and_its_robustness_the_hardened_models() -> None:
    images = quadrant_images()
    robustness = replace(FAST, eps=0.9 * RADIUS)
    scores = evaluate_victim(Quadrants(), served(constant(4, 16)), as_images(images), robustness, 0).metrics
    assert scores["victim_acc"] == 1 / 4
    assert scores["victim_robust_fgsm"] == scores["victim_robust_pgd"] == 1.0


def test_a_wider_ball_leaves_fewer_images_robust(net: nn.Module, blobs: Images) -> None:
    near, far = (evaluate_student(net, blobs, replace(FAST, eps=eps), 0).metrics for eps in (2 / 255, 64 / 255))
    assert near["student_acc"] == far["student_acc"] > 0.9
    assert 0 <= far["student_robust_pgd"] < near["student_robust_pgd"] <= near["student_acc"]
    assert 0 <= far["student_robust_fgsm"] < near["student_robust_fgsm"] <= near["student_acc"]


def test_autoattack_is_left_out_where_its_loss_is_not_defined(net: nn.Module, blobs: Images) -> None:
    scores = evaluate_student(net, blobs, SHORT, 0).metrics
    assert "student_robust_autoattack" not in scores
    assert {"student_robust_pgd", "student_cw_success", "student_cw_l2"} <= scores.keys()


def test_fidelity_counts_equal_labels_right_or_wrong() -> None:
    images = quadrant_images(7)
    images = replace(images, y=(images.y + 1) % 4)  # the victim is never right
    assert beside(constant(4, 16), served(Quadrants()), images, NONE) == {"fidelity": 2 / 7}


def test_the_sensitivity_of_a_linear_network_is_the_mean_size_of_its_summed_weights() -> None:
    weight = torch.randn(5, 2 * 3 * 3, generator=torch.Generator().manual_seed(0))
    x = torch.rand(BATCH + 7, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    expected = float(weight.sum(dim=0).abs().mean())
    network = EvaluatedNetwork(Affine(weight, torch.zeros(5)), x)
    assert sensitivity(network, x) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("robustness", [FAST, SHORT], ids=["fast", "full"])
def test_same_seed_same_numbers_whatever_was_drawn_before(
    robustness: Robustness, net: nn.Module, blobs: Images
) -> None:
    def all_scores() -> dict[str, float]:
        student = evaluate_student(net, blobs, robustness, 5)
        labels = predict_labels(served(net), blobs.test.x)
        return student.metrics | evaluate_against(student, served(net), labels, blobs, robustness, 5)

    first = all_scores()
    torch.rand(7)
    assert all_scores() == first


def test_a_higher_level_does_not_change_the_numbers_of_a_lower_one(net: nn.Module, blobs: Images) -> None:
    fast, full = (evaluate_student(net, blobs, replace(SHORT, level=level), 0).metrics for level in ("fast", "full"))
    assert fast.items() <= full.items()


def test_random_generators_are_left_as_they_were() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    evaluate_student(Quadrants(), as_images(quadrant_images()), SHORT, 0)
    beside(Quadrants(), served(Quadrants()), quadrant_images(), SHORT)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]  # noqa: NPY002


def test_a_network_is_left_as_it_was(net: nn.Module, blobs: Images) -> None:
    """In part in training mode, in part frozen; its weights, batch statistics and gradients untouched."""
    net.train()
    net.get_submodule("features.1").eval()
    next(net.parameters()).requires_grad_(False)

    def state() -> list[object]:
        modes = [module.training for module in net.modules()]
        return [modes, *((p.requires_grad, p.grad) for p in net.parameters())]

    before, weights = state(), {name: value.clone() for name, value in net.state_dict().items()}
    evaluate_student(net, blobs, SHORT, 0)
    evaluate_victim(net, served(constant()), blobs, SHORT, 0)
    beside(net, served(constant()), blobs.test, SHORT)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_a_network_is_evaluated_in_eval_mode_whatever_mode_it_is_in(net: nn.Module, blobs: Images) -> None:
    expected = evaluate_student(net.eval(), blobs, SHORT, 0).metrics
    assert evaluate_student(net.train(), blobs, SHORT, 0).metrics == expected


def test_a_network_is_put_back_when_an_attack_fails() -> None:
    model = Quadrants().train()

    def fails() -> None:
        with frozen_in_eval_mode(model):
            assert not model.training
            assert not model.scale.requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert model.training
    assert model.scale.requires_grad


def test_every_declared_metric_of_an_evaluation_is_measured_and_no_other() -> None:
    images = as_images(quadrant_images())
    robustness = replace(FULL, eps=0.9 * RADIUS)
    student = evaluate_student(Quadrants(), images, robustness, 0)
    victim = evaluate_victim(Quadrants(), served(Quadrants()), images, robustness, 0)
    together = evaluate_against(student, served(Quadrants()), victim.predictions.test, images, robustness, 0)
    assert METRICS.keys() == student.metrics.keys() | victim.metrics.keys() | together.keys() | {"queries"}
