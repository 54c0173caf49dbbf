"""The skeptical student: its loss, its stages and heads, and its delay."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import blobs, context, equal, taught, undefended
from kdbench import registry
from kdbench.api import (
    Access,
    Attack,
    KdbenchError,
    Oracle,
    Scenario,
    Service,
    Split,
    kd,
    predict_logits,
    soften,
)
from kdbench.attacks.skeptical import Block, Skeptic, Skeptical, classifier, stages
from kdbench.game.methods import EngineHooks
from kdbench.training.fit import inference
from kdbench.training.fused import FusedTraining
from kdbench.zoo.layers import Network


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


def shifted(model: nn.Module) -> Service:
    """Lies about every image, always in the same way."""
    return lambda x: undefended(model)(x).roll(1, dims=1)


def oracle_on(model: nn.Module, budget: int | None = None, access: Access = Access.TOPK, topk: int = 5) -> Oracle:
    return Oracle(undefended(model), Scenario(access=access, topk=topk, budget=budget), model)


def lying(service: Service, model: nn.Module) -> Oracle:
    return Oracle(service, Scenario(), model)


def name(attack: Attack) -> str:
    return f"{type(attack).__name__}-{getattr(attack, 'average', '')}-{getattr(attack, 'queries', '')}"


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_skeptical_loss_is_the_sum_of_its_terms() -> None:
    h, t, y = draw(5, 3, 4), draw(5, 4, seed=1), torch.arange(5) % 4
    h_0, h_1, h_loc = h.unbind(dim=1)
    distilled = (soften(h_0, 4.0) * (soften(h_0, 4.0).log() - soften(h_1, 4.0).log())).sum(dim=1).mean()
    ce = [F.cross_entropy(z, y) for z in (h_0, h_1)]
    expected = kd(h_loc, t, y, 4.0, 0.9) + 0.3 * distilled + 0.7 * ce[1] + ce[0]
    torch.testing.assert_close(Skeptical().loss(h, t, y), expected)


def test_the_head_of_the_victim_may_be_the_one_that_h_0_teaches() -> None:
    h, t, y = draw(5, 2, 4), draw(5, 4, seed=1), torch.arange(5) % 4
    torch.testing.assert_close(Skeptical().loss(h, t, y), Skeptical().loss(h[:, [0, 1, 1]], t, y))


def test_the_distillation_of_h_0_has_a_gradient_for_teacher_and_pupil() -> None:
    h, t, y = draw(5, 3, 4).requires_grad_(), draw(5, 4, seed=1), torch.arange(5) % 4
    (gradient,) = torch.autograd.grad(Skeptical(self_distillation=1.0).loss(h, t, y), h)
    own = h.detach()[:, 0]
    alone = (own.softmax(dim=1) - F.one_hot(y, 4)) / 5
    assert not torch.allclose(gradient[:, 0], alone)
    assert gradient[:, 1].abs().max() > 0


def test_the_victim_teaches_the_shallow_part_alone(data: Split) -> None:
    ctx = context(data, model="takd-plane-6")  # three stages: h_1 after the second, h_2 after the first
    net = ctx.new_student()
    with Skeptic(net, 2, ctx) as skeptic:
        h = skeptic(data.x[:8])
    assert h.shape == (8, 3, 3)
    kd(h[:, -1], data.y[:8, None].expand(8, 3).float() * torch.arange(3), None, 4.0, 0.9).backward()
    taught = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    shallow = [f"features.{layer}.{tensor}" for layer in (0, 1, 3, 4) for tensor in ("weight", "bias")]
    assert taught <= set(shallow)  # convolutions and norms up to the first halving
    assert {"features.0.weight", "features.4.weight"} <= taught


def test_the_own_answers_of_a_skeptical_student_are_the_students(data: Split) -> None:
    ctx = context(data)
    net = ctx.new_student()
    with Skeptic(net, 2, ctx) as skeptic:
        skeptic.eval()
        torch.testing.assert_close(skeptic(data.x)[:, 0], predict_logits(net, data.x))


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        ("resnet-18", [64, 128, 256, 512]),
        ("mobilenetv2", [16, 24, 32, 1280]),
        ("preresnet-20", [16, 32, 64]),
        ("cnn", [32, 64, 128]),
        ("mini-8", [8, 16]),
    ],
)
def test_stages_are_where_maps_keep_their_size(model: str, channels: list[int]) -> None:
    x = torch.zeros(2, 3, 32, 32)
    network = registry.load("model", model)((3, 32, 32), 10)
    assert [stage.channels for stage in stages(network, x)] == channels
    wrapped = stages(nn.Sequential(nn.Identity(), network), x)  # as the runner wraps it, standardising first
    assert [stage.channels for stage in wrapped] == channels
    assert not any(layer._forward_hooks for layer in network.modules())


def test_a_stage_ends_with_its_last_layer_on_the_trunk_and_not_in_a_branch() -> None:
    found = stages(registry.load("model", "resnet-18")((3, 32, 32), 10), torch.zeros(2, 3, 32, 32))
    assert found[1] == Block("features.4", 128)
    tiny = stages(registry.load("model", "resnet-18")((1, 8, 8), 10), torch.zeros(2, 1, 8, 8))
    assert [stage.channels for stage in tiny] == [64, 128, 256, 512]  # though the last maps are single pixels


def test_a_network_that_shrinks_nowhere_is_refused(data: Split, victim: nn.Module) -> None:
    def flat(name: str | None = None) -> nn.Module:
        return Network(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten()), nn.Linear(256, 3))

    with pytest.raises(KdbenchError, match="maps shrink in stages"):
        Skeptical().steal(oracle_on(victim), replace(context(data), new_student=flat))


def test_an_auxiliary_classifier_halves_to_the_width_of_each_later_stage() -> None:
    head = classifier([8, 16, 32], classes=5)
    wide = [layer.out_channels for layer in head if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)]
    assert wide == [16, 32]
    assert head[:9](torch.rand(2, 8, 8, 8)).shape == (2, 32, 2, 2)
    assert head(torch.rand(2, 8, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(("delay", "blind"), [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_the_victim_is_not_believed_before_the_delay_is_over(delay: float, blind: int) -> None:
    attack, ctx = Skeptical(), context(blobs().train)
    loss = attack._delayed(Skeptic(ctx.new_student(), 2, ctx), images=40 * delay)
    h, t, y = draw(5, 3, 4), draw(5, 4, seed=1), torch.arange(5) % 4
    values = [float(loss(h, (t, y))) for _ in range(8)]
    alone, full = float(F.cross_entropy(h[:, 0], y)), float(attack.loss(h, t, y))
    assert values == [alone] * blind + [full] * (8 - blind)


def test_a_skeptical_student_who_never_listens_is_deaf_to_the_victim(data: Split, victim: nn.Module) -> None:
    deaf = Skeptical(delay=1.0)
    one, two = (deaf.steal(lying(s, victim), context(data)) for s in (undefended(victim), shifted(victim)))
    assert equal(one, two)
    listening = (
        replace(deaf, delay=0.0).steal(lying(s, victim), context(data)) for s in (undefended(victim), shifted(victim))
    )
    assert not equal(*listening)


def test_skeptical_students_in_fused_training_learn_what_they_learn_alone(data: Split, victim: nn.Module) -> None:
    def steal(fused: FusedTraining | None, seed: int, out: dict[int, nn.Module]) -> None:
        out[seed] = Skeptical(delay=0.5).steal(
            oracle_on(victim), replace(context(data, seed=seed), engine=EngineHooks(inference, fused))
        )

    alone: dict[int, nn.Module] = {}
    together: dict[int, nn.Module] = {}
    for seed in (0, 1):
        steal(None, seed, alone)
    fused = FusedTraining()
    fused.run([lambda s=seed: steal(fused, s, together) for seed in (0, 1)])  # type: ignore[misc]
    assert all(equal(alone[seed], together[seed]) for seed in (0, 1))
