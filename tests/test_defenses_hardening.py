"""Defenses that harden: their laws, Nasty, and defensive distillation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import S, T, Y, blobs, context, near, taught
from kdbench.api import (
    Context,
    Defense,
    Diverged,
    KdbenchError,
    Split,
    fit,
    predict_logits,
    soften,
)
from kdbench.defenses.adversarial_sparse import AdversarialSparse
from kdbench.defenses.assistant_distillation import AssistantDistillation
from kdbench.defenses.nasty import Nasty
from kdbench.game.methods import Log

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    net = taught(data, epochs=12, seed=1)
    net.zero_grad()  # what a gradient later shows is not of its own training
    return net


def state(net: nn.Module) -> State:
    """Parameters and buffers, copied."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def buffers(net: nn.Module) -> State:
    return {name: value.clone() for name, value in net.named_buffers()}


HARDENERS = [
    Nasty(),
    AdversarialSparse(iterations=3),
    AdversarialSparse(iterations=3, divergence="kl"),
    AdversarialSparse(iterations=3, pairing="random", space="normalised"),
    AssistantDistillation(steps=1),
    AssistantDistillation(),
]


# All that harden


@pytest.mark.parametrize("defense", HARDENERS, ids=repr)
def test_hardening_leaves_the_victim_as_it_is(defense: Defense, victim: nn.Module, data: Split) -> None:
    before = state(victim)
    hardened = defense.harden(victim, context(data))
    assert same(state(victim), before)
    assert all(parameter.grad is None for parameter in victim.parameters())
    shared = {value.data_ptr() for value in victim.state_dict().values()}
    assert not any(value.data_ptr() in shared for value in hardened.state_dict().values())
    assert not same(state(hardened), before)


@pytest.mark.parametrize("defense", HARDENERS, ids=repr)
def test_hardening_draws_from_the_context_alone(defense: Defense, victim: nn.Module, data: Split) -> None:
    first = state(defense.harden(victim, context(data)))
    torch.manual_seed(99)
    around = torch.get_rng_state()
    second = state(defense.harden(victim, context(data)))
    assert torch.equal(torch.get_rng_state(), around)
    assert same(first, second)
    assert not same(first, state(defense.harden(victim, context(data, seed=2))))


@pytest.mark.parametrize("defense", HARDENERS, ids=repr)
def test_a_hardened_model_is_in_eval_mode_and_answers_with_probabilities(
    defense: Defense, victim: nn.Module, data: Split
) -> None:
    ctx = context(data)
    hardened = defense.harden(victim, ctx)
    assert not any(module.training for module in hardened.modules())
    answers = defense.serve(hardened, ctx)(data.x)
    assert answers.shape == (len(data), data.classes)
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(len(data)))


# Nasty


def test_nasty_puts_the_nasty_distribution_first() -> None:
    near(Nasty(tau=4.0).contradiction(S, T), 0.880778509)
    near(Nasty(tau=4.0).contradiction(T, S), 0.943513726)


def test_nasty_loss_is_cross_entropy_less_the_contradiction() -> None:
    near(Nasty(omega=0.0).loss(S, (T, Y)), 1.495181898)
    near(Nasty(tau=4.0, omega=0.04).loss(S, (T, Y)), 1.459950758)


def test_nasty_gradient_reaches_the_first_argument_of_the_divergence() -> None:
    z = S.clone().requires_grad_()
    near(gradient(Nasty(tau=4.0).contradiction(z, T), z), [[-0.553382, 0.310387, 0.096378, 0.146617]], digits=6)


def test_nasty_takes_the_mean_over_the_batch_and_the_sum_over_classes() -> None:
    batch = Nasty(tau=4.0).contradiction(torch.cat([S, S, T]), torch.cat([T, T, T]))
    near(batch, 2 / 3 * 0.880778509)


def test_nasty_is_at_a_stationary_point_of_the_divergence_where_it_equals_its_adversary(
    victim: nn.Module, data: Split
) -> None:
    z = predict_logits(victim, data.x).double().requires_grad_()
    divergence = Nasty().contradiction(z, z.detach())
    near(divergence, 0.0, digits=12)
    near(gradient(divergence, z), torch.zeros_like(z), digits=12)


def test_nasty_without_omega_is_plain_training(victim: nn.Module, data: Split) -> None:
    assert same(state(Nasty(omega=0.0).harden(victim, context(data))), state(taught(data)))


def test_nasty_contradicts_more_than_plain_training_does(victim: nn.Module, data: Split) -> None:
    nasty = Nasty(omega=0.5)
    divergence = [
        nasty.contradiction(predict_logits(net, data.x), predict_logits(victim, data.x))
        for net in (nasty.harden(victim, context(data, epochs=8)), taught(data, epochs=8))
    ]
    assert divergence[0] > 2 * divergence[1]


def test_nasty_starts_once_more_with_clipped_gradients_after_a_divergence(victim: nn.Module, data: Split) -> None:
    wild = Nasty(omega=1e30)
    ctx = context(data)
    hardened = wild.harden(victim, ctx)
    assert ctx.log.numbers["guarded"] == 1
    assert predict_logits(hardened, data.x).isfinite().all()
    with pytest.raises(Diverged):
        replace(wild, clip=0.0).harden(victim, context(data))
    calm = context(data)
    Nasty().harden(victim, calm)
    assert "guarded" not in calm.log.numbers


def test_nasty_guards_no_looser_than_the_recipe(
    victim: nn.Module, data: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips: list[float] = []

    def train(_self: Nasty, victim: nn.Module, ctx: Context) -> nn.Module:
        clips.append(ctx.recipe.clip)
        if len(clips) % 2:
            raise Diverged("made up")
        return victim

    monkeypatch.setattr(Nasty, "_train", train)
    for own in (0.0, 0.5, 3.0):
        ctx = context(data)
        Nasty(clip=1.0).harden(victim, replace(ctx, recipe=replace(ctx.recipe, clip=own)))
    assert clips == [0.0, 1.0, 0.5, 0.5, 3.0, 1.0]


class Shares(Log):
    """Writes down how far each fit is after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def progress(self, share: float, text: str) -> None:
        self.shares.append(share)


# Defensive distillation


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_a_chain_trains_one_start_for_one_epoch_one_teacher_and_its_steps(
    steps: int, victim: nn.Module, data: Split
) -> None:
    log = Shares()
    AssistantDistillation(steps=steps).harden(victim, replace(context(data), log=log))
    assert log.shares == [1.0] + [0.5, 1.0] * (1 + steps)


def test_a_chain_of_one_step_is_plain_defensive_distillation(victim: nn.Module, data: Split) -> None:
    chain = state(AssistantDistillation(temperature=3.0, steps=1).harden(victim, context(data)))
    torch.testing.assert_close(chain, distilled(data, 3.0, generations=1))


def test_in_a_longer_chain_each_learns_from_the_one_before_it(victim: nn.Module, data: Split) -> None:
    chain = state(AssistantDistillation(temperature=3.0, steps=3).harden(victim, context(data)))
    torch.testing.assert_close(chain, distilled(data, 3.0, generations=3))


def test_defensive_distillation_learns_from_labels_as_from_their_one_hot_answers() -> None:
    loss = AssistantDistillation(temperature=4.0).loss
    near(loss(S, Y) - loss(S, F.one_hot(Y, 4).double()), 0.0, digits=12)
    near(loss(S, soften(T, 4.0)), -(soften(T, 4.0) * (S / 4).log_softmax(dim=1)).sum(), digits=12)


def test_defensive_distillation_at_temperature_one_uses_the_usual_loss() -> None:
    near(AssistantDistillation(temperature=1.0).loss(S, Y), 1.495181898)


def test_defensive_distillation_needs_a_step() -> None:
    with pytest.raises(KdbenchError, match=r"steps.*greater than or equal to 1"):
        AssistantDistillation(steps=0)


def test_defensive_distillation_is_served_at_temperature_one(victim: nn.Module, data: Split) -> None:
    answers = AssistantDistillation().serve(victim, context(data))(data.x)
    torch.testing.assert_close(answers.exp(), predict_logits(victim, data.x).softmax(dim=1))


def distilled(data: Split, temperature: float, generations: int) -> State:
    """Papernot et al. 2016, repeated: all networks from one start, labels as one-hot answers."""
    ctx = context(data)

    def train(ctx: Context, start: State, T: float, answers: Tensor) -> nn.Module:
        net = context(data).new_student()
        net.load_state_dict(start)
        fit(net, lambda z, p: -(p * (z / T).log_softmax(dim=1)).sum(dim=1).mean(), data.x, answers, ctx)
        return net

    answers = F.one_hot(data.y, data.classes).float()
    fresh = state(ctx.new_student())
    start = state(train(ctx.training(epochs=1), fresh, 1.0, answers))
    net = train(ctx, start, temperature, answers)
    for _ in range(generations):
        answers = (predict_logits(net, data.x) / temperature).softmax(dim=1)
        torch.testing.assert_close(answers.sum(dim=1), torch.ones(len(data)))
        net = train(ctx, start, temperature, answers)
    return state(net)


def gradient(value: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(value, by)[0]
