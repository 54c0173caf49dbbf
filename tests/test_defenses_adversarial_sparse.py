"""Adversarial Sparse Teacher: its loss, its pairs, and its adversarial images."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import S, T, Y, blobs, context, near, taught
from kdbench.api import (
    Split,
    keep_top,
    predict_logits,
    soften,
)
from kdbench.defenses.adversarial_sparse import AdversarialSparse

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    net = taught(data, epochs=12, seed=1)
    net.zero_grad()  # what a gradient later shows is not of its own training
    return net


@pytest.fixture
def adversarial_sparse() -> AdversarialSparse:
    return AdversarialSparse(alpha=0.05, temperature=6.0, k=2)


def state(net: nn.Module) -> State:
    """Parameters and buffers, copied."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def buffers(net: nn.Module) -> State:
    return {name: value.clone() for name, value in net.named_buffers()}


def rows(classes: int, count: int = 64) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(5))


def test_ast_answers_have_the_papers_numbers(adversarial_sparse: AdversarialSparse) -> None:
    near(soften(S, 6.0), [[0.261922, 0.309424, 0.240980, 0.187675]], digits=6)
    near(adversarial_sparse.sparse(nn.Flatten(), T[:, :, None, None]), [[0.582570, 0.417430, 0.0, 0.0]], digits=6)


def test_ast_losses_have_the_papers_numbers(adversarial_sparse: AdversarialSparse) -> None:
    q = adversarial_sparse.sparse(nn.Flatten(), T[:, :, None, None])
    near(adversarial_sparse.distance(S, q), 0.309468954)
    near(adversarial_sparse.loss(S, q, Y), 1.977466920)
    near(replace(adversarial_sparse, divergence="kl").distance(S, q), 0.590689527)


def test_ast_exponential_form_is_the_release_s_divergence_of_probabilities_taken_for_logarithms() -> None:
    p, q = rows(6).double(), soften(keep_top(rows(6).double().roll(1, 0), 2), 6.0)
    released = F.kl_div(soften(p, 6.0), q, log_target=True, reduction="batchmean")
    torch.testing.assert_close(AdversarialSparse().distance(p, q), released)


def test_ast_exponential_gradient_has_the_weights_one_to_e() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.4, 0.0, 0.0]], dtype=torch.float64)
    z = p.log().mul(6).requires_grad_()
    pull = -q.exp()  # dD/dp, then through the softmax
    torch.testing.assert_close(gradient(AdversarialSparse().distance(z, q), z), p * (pull - (p * pull).sum()) / 6)


def test_ast_asks_the_model_without_gradient_or_trace(data: Split, victim: nn.Module) -> None:
    defense = AdversarialSparse()
    hardened = context(data).new_student()
    hardened.train()
    before = state(hardened)
    q = defense.sparse(hardened, data.x)
    assert not q.requires_grad
    assert same(state(hardened), before)
    assert all(module.training for module in hardened.modules())
    torch.testing.assert_close(q, soften(keep_top(predict_logits(hardened, data.x), defense.k), defense.temperature))


def test_ast_without_alpha_is_plain_training_batch_norm_included(victim: nn.Module, data: Split) -> None:
    hardened = AdversarialSparse(alpha=0.0, iterations=1).harden(victim, context(data))
    assert same(state(hardened), state(taught(data)))
    assert buffers(hardened)


@pytest.mark.parametrize(
    "change", [{"divergence": "kl"}, {"pairing": "random"}, {"space": "normalised"}, {"alpha": 0.0}]
)
def test_ast_variants_train_different_models(change: dict[str, object], victim: nn.Module, data: Split) -> None:
    defense = AdversarialSparse(iterations=3, alpha=0.5)
    changed = replace(defense, **change)  # type: ignore[arg-type]
    assert not same(state(defense.harden(victim, context(data))), state(changed.harden(victim, context(data))))


def test_ast_pulls_clean_answers_towards_the_sparse_ones(victim: nn.Module, data: Split) -> None:
    defense = AdversarialSparse(alpha=0.3, divergence="kl", eps=0.1, iterations=10)
    images = defense.adversarial_images(victim, context(data))
    distance = [
        defense.distance(predict_logits(net, data.x), defense.sparse(net, images))
        for net in (defense.harden(victim, context(data, epochs=8)), taught(data, epochs=8))
    ]
    assert distance[0] < 0.5 * distance[1]


def test_ast_pairs_an_image_with_its_own_adversarial_version_or_with_any(data: Split) -> None:
    ctx = context(data)
    numbered = torch.arange(96.0)[:, None, None, None].expand(-1, 1, 8, 8)
    assert AdversarialSparse(pairing="paired").pair(numbered, ctx) is numbered
    draw = AdversarialSparse(pairing="random").pair(numbered, ctx)
    assert callable(draw)
    first, second = draw(data.x[:32]), draw(data.x[:32])
    assert first.shape == second.shape == (32, 1, 8, 8)
    assert not torch.equal(first, second)
    again = AdversarialSparse(pairing="random").pair(numbered, context(data))
    assert callable(again)
    assert torch.equal(again(data.x[:32]), first)
    assert len(set(first[:, 0, 0, 0].tolist())) > 16  # 32 draws of 96


@pytest.mark.parametrize(("eps", "iterations"), [(0.05, 10), (0.3, 40)])
def test_pgd_in_pixel_space_keeps_to_its_ball_and_raises_the_loss(
    eps: float, iterations: int, victim: nn.Module, data: Split
) -> None:
    images = AdversarialSparse(eps=eps, iterations=iterations).adversarial_images(victim, context(data))
    assert (images - data.x).abs().max() <= eps + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1
    noise = data.x + eps * torch.randn(data.x.shape, generator=torch.Generator().manual_seed(7)).sign()
    clean, noisy, attacked = (
        F.cross_entropy(predict_logits(victim, x), data.y) for x in (data.x, noise.clamp(0, 1), images)
    )
    assert attacked > max(clean, noisy)


def test_pgd_steps_along_the_sign_of_the_gradient_of_the_frozen_victim(victim: nn.Module, data: Split) -> None:
    victim.train()  # the attack must not care
    images = AdversarialSparse(step=0.02, iterations=1).adversarial_images(victim, context(data))
    victim.eval()
    expected = (data.x + 0.02 * gradient_sign(victim, data.x, data.y)).clamp(0, 1)
    torch.testing.assert_close(images, expected)


def test_pgd_in_normalised_space_clamps_as_the_release_does(victim: nn.Module, data: Split) -> None:
    mean, std = data.x.mean(), data.x.std(correction=0)
    images = AdversarialSparse(space="normalised", step=0.02, iterations=1).adversarial_images(victim, context(data))
    units = (data.x - mean) / std + 0.02 * gradient_sign(victim, data.x, data.y)
    torch.testing.assert_close(images, units.clamp(0, 1) * std + mean)
    assert ((images - data.x).abs().amax(dim=(1, 2, 3)) > 0.3 * std).all()  # the clamp moves more than eps does


def test_pgd_in_normalised_space_gives_pixels_whatever_the_channels(data: Split) -> None:
    bright = (torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.9).float()  # mean + std > 1
    flat = torch.full_like(bright, 0.5)
    coloured = replace(data, x=torch.cat([data.x, bright, flat], dim=1))
    ctx = context(coloured)
    images = AdversarialSparse(space="normalised", iterations=2).adversarial_images(ctx.new_student(), ctx)
    assert images.min() >= 0
    assert images.max() <= 1


def gradient_sign(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return gradient(F.cross_entropy(net(x), y), x).sign()


def gradient(value: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(value, by)[0]
