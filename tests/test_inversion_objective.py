"""DeepInversion: the terms of its objective, and the features' statistics."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inversions import SMALL, hooks, norms
from torch import Tensor, nn

from helpers import S, T, blobs, context, taught
from kdbench.api import (
    Split,
    jensen_shannon,
    kl,
    predict_logits,
    soften,
)
from kdbench.attacks._features import Features, Normed
from kdbench.attacks.deep_inversion import DeepInversion, Objective, total_variation


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


# Formulas


def test_the_competition_term_is_the_true_jensen_shannon_divergence() -> None:
    assert float(jensen_shannon(soften(T, 3.0), soften(S, 3.0))) == pytest.approx(0.025807955, abs=1e-8)


def test_the_competition_term_is_not_the_reversed_divergence_of_the_official_code() -> None:
    p, q = soften(T, 3.0), soften(S, 3.0)
    middle = (p + q) / 2
    reverse = float(kl(middle, p.log()) + kl(middle, q.log())) / 2
    assert reverse == pytest.approx(0.026398930, abs=1e-8)
    assert float(jensen_shannon(p, q)) != pytest.approx(reverse, abs=1e-4)


def test_total_variation_sums_the_norms_of_four_directions() -> None:
    u = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    assert float(total_variation(u)) == pytest.approx(13**0.5 + 5**0.5 + 4 + 1)


# DeepInversion: the terms


def test_the_feature_distance_is_zero_where_a_batch_is_what_the_layers_remember(victim: nn.Module) -> None:
    net, x = copy.deepcopy(victim).double(), torch.rand(32, 1, 8, 8, dtype=torch.float64)
    for layer in norms(net):  # in order: in eval mode, what enters a layer depends on those before it alone
        entering = inputs(net, x)[layer]
        layer.running_mean = entering.mean(dim=(0, 2, 3))
        layer.running_var = entering.var(dim=(0, 2, 3), correction=0)
    with Features(net) as features:
        assert distance(features, x) < 1e-10
        assert distance(features, 1 - x) > 0.1


def test_the_feature_distance_is_the_papers_sum(data: Split, victim: nn.Module) -> None:
    entering = inputs(victim, data.x)
    expected = 0.0
    for layer in norms(victim):
        var, mean = torch.var_mean(entering[layer], dim=(0, 2, 3), correction=0)
        expected += float((var - layer.running_var).norm() + (mean - layer.running_mean).norm())
    with Features(victim) as features:
        z, r_feat = features(data.x), features.distance()
        features(data.x)
        again = features.distance()
    assert float(r_feat) == pytest.approx(expected, rel=1e-5)
    assert float(again) == float(r_feat)  # of one forward pass, not of all so far
    torch.testing.assert_close(z, predict_logits(victim, data.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 3), (4, 3, 2), (4, 3, 2, 5)])
def test_a_fused_norm_and_its_gradient_are_right(size: tuple[int, ...]) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(size, dtype=torch.float64, generator=draws, requires_grad=True)
    scale, shift = torch.rand(2, 3, dtype=torch.float64, generator=draws)
    y, mean, var = Normed.apply(x, scale, shift)
    dims = [d for d in range(len(size)) if d != 1]
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(var, x.var(dims, correction=0))
    wide = (1, 3, *[1] * (len(size) - 2))
    torch.testing.assert_close(y, x * scale.view(wide) + shift.view(wide))
    assert torch.autograd.gradcheck(lambda x: Normed.apply(x, scale, shift), x)


class Strange(nn.BatchNorm2d):
    """A batch norm that doubles what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(1, 4, 3), Strange(4), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)],
        [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(1, 4, 3), *[nn.BatchNorm2d(4)] * 2, nn.Flatten(), nn.Linear(144, 3)],
    ],
    ids=["no weights", "a subclass", "flat", "no memory", "the same twice"],
)
def test_features_change_no_answer_of_any_batch_norm(layers: list[nn.Module]) -> None:
    """Answers, the distance and the gradient of both, against hooks and autograd alone."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers).double()
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    net.eval().requires_grad_(False)
    x = torch.rand(16, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    gaps = [x.new_zeros(())]

    def look(layer: Any, entering: tuple[Tensor]) -> None:
        dims = [d for d in range(entering[0].ndim) if d != 1]
        var, mean = torch.var_mean(entering[0], dims, correction=0)
        gaps.append((var - layer.running_var).norm() + (mean - layer.running_mean).norm())

    watched = [layer for layer in Features(net).layers]
    handles = [layer.register_forward_pre_hook(look) for layer in watched]
    expected = net(x)
    for handle in handles:
        handle.remove()
    (slope,) = torch.autograd.grad(expected.sum() + sum(gaps), x)
    with Features(net) as features:
        z, r_feat = features(x), features.distance()
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(r_feat, torch.stack(gaps).sum())
    torch.testing.assert_close(torch.autograd.grad(z.sum() + r_feat, x)[0], slope)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    assert hooks(net) == 0


def test_an_inversion_in_bf16_has_nearly_the_same_loss(data: Split, victim: nn.Module) -> None:
    u, y = 4 * data.x - 2, data.y
    losses = []
    for precision in ("fp32", "bf16"):
        ctx = replace(context(data), precision=precision)
        with torch.no_grad(), Features(victim) as features:
            losses.append(Objective(SMALL, features, context(data).new_student().eval(), ctx)(u, y))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)
    assert not torch.equal(*losses)


def test_no_hook_is_left_after_an_error(victim: nn.Module) -> None:
    def fail() -> None:
        with Features(victim) as features:
            assert hooks(victim) == 3
            features(torch.zeros(2, 5, 8, 8))

    with pytest.raises(RuntimeError):
        fail()
    assert hooks(victim) == 0


def test_the_whole_objective_is_the_sum_of_its_terms(data: Split, victim: nn.Module) -> None:
    attack = DeepInversion(feature=3.0, tv=0.2, l2=0.1, competition=5.0)
    competing_student = context(data).new_student().eval()
    u, y = 4 * data.x - 2, data.y
    with torch.no_grad(), Features(victim) as features:
        loss, r_feat = Objective(attack, features, competing_student, context(data))(u, y)
        z, same = features(data.x), features.distance()
    divergence = jensen_shannon(soften(z, 3.0), soften(predict_logits(competing_student, data.x), 3.0))
    expected = F.cross_entropy(z, y) + 0.2 * total_variation(u) + 0.1 * u.norm() + 3.0 * same + 5.0 * (1 - divergence)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(r_feat, same)


def distance(features: Features, x: Tensor) -> float:
    """R_feat of the images `x`."""
    features(x)
    return float(features.distance())


def inputs(model: nn.Module, x: Tensor) -> dict[nn.Module, Tensor]:
    """What enters each batch norm of `model` in eval mode."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda net, entering: seen.update({net: entering[0]})) for layer in norms(model)
    ]
    predict_logits(model, x)
    for handle in handles:
        handle.remove()
    return seen
