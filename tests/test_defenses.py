"""The built-in defenses: the papers' formulas as numbers, and the laws that need no long training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import blobs, context
from kdbench.api import (
    Context,
    Defense,
    Diverged,
    KdbenchError,
    Split,
    fit,
    kd,
    kd_term,
    keep_top,
    predict_logits,
    soften,
)
from kdbench.defenses.adversarial_sparse import AdversarialSparse
from kdbench.defenses.assistant_distillation import AssistantDistillation
from kdbench.defenses.nasty import Nasty
from kdbench.defenses.stingy import Stingy
from kdbench.game.methods import Log

S = torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64)
T = torch.tensor([[3.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
Y = torch.tensor([0])

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    net = plain(data, epochs=12, seed=1)
    net.zero_grad()  # what a gradient later shows is not of its own training
    return net


@pytest.fixture
def adversarial_sparse() -> AdversarialSparse:
    return AdversarialSparse(alpha=0.05, temperature=6.0, k=2)


def near(value: Tensor, expected: object, digits: int = 9) -> None:
    """Equal up to the last of `digits` printed digits after the point."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.reshape(wanted.shape), wanted, rtol=0, atol=0.6 * 10**-digits)


def state(net: nn.Module) -> State:
    """Parameters and buffers, copied."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def buffers(net: nn.Module) -> State:
    return {name: value.clone() for name, value in net.named_buffers()}


def split_of(classes: int) -> Split:
    """A split of which only the number of classes matters."""
    return Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), classes)


def served(defense: Defense, z: Tensor) -> Tensor:
    """The answers (N,K) of a model whose logits are `z`: an "image" is its logits."""
    return defense.serve(nn.Flatten(), context(split_of(z.shape[1])))(z[:, :, None, None])


def rows(classes: int, count: int = 64) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(5))


# All that harden


HARDENERS = [
    Nasty(),
    AdversarialSparse(iterations=3),
    AdversarialSparse(iterations=3, divergence="kl"),
    AdversarialSparse(iterations=3, pairing="random", space="normalised"),
    AssistantDistillation(steps=1),
    AssistantDistillation(),
]


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


def test_nasty_gradient_reaches_the_first_slot_of_the_divergence() -> None:
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
    assert same(state(Nasty(omega=0.0).harden(victim, context(data))), state(plain(data)))


def test_nasty_contradicts_more_than_plain_training_does(victim: nn.Module, data: Split) -> None:
    nasty = Nasty(omega=0.5)
    divergence = [
        nasty.contradiction(predict_logits(net, data.x), predict_logits(victim, data.x))
        for net in (nasty.harden(victim, context(data, epochs=8)), plain(data, epochs=8))
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


# Stingy


def test_stingy_target_has_the_papers_numbers_at_both_temperatures() -> None:
    answers = served(Stingy(ratio=0.5), T)
    near(soften(answers, 20.0), [[0.524979, 0.475021, 0.0, 0.0]], digits=6)
    near(soften(answers, 1.0), [[0.880797, 0.119203, 0.0, 0.0]], digits=6)


def test_stingy_costs_a_student_what_the_paper_says() -> None:
    answers = served(Stingy(ratio=0.5), T)
    near(kd_term(S, answers, 20.0), 261.340200628)
    near(kd(S, answers, Y, 20.0, 0.9), 235.355698755)


@pytest.mark.parametrize(("ratio", "classes", "revealed"), [(0.2, 10, 2), (0.1, 100, 10), (0.1, 200, 20), (0.1, 3, 1)])
def test_stingy_reveals_as_many_classes_as_the_paper(ratio: float, classes: int, revealed: int) -> None:
    assert Stingy(ratio=ratio).revealed(classes) == revealed


def test_stingy_is_not_misled_by_the_rounding_of_the_ratio() -> None:
    assert [Stingy(ratio=n / 100).revealed(100) for n in range(1, 101)] == list(range(1, 101))


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.35, 0.999, 1.0])
def test_stingy_support_is_exact_sums_to_one_and_keeps_the_label(ratio: float) -> None:
    z = rows(10)
    answers = served(Stingy(ratio=ratio), z)
    assert (answers.isfinite().sum(dim=1) == Stingy(ratio=ratio).revealed(10)).all()
    assert not answers.isnan().any()
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(len(z)))
    assert torch.equal(answers.argmax(dim=1), z.argmax(dim=1))


@pytest.mark.parametrize("hidden", ["minus-infinity", "zero"])
def test_stingy_answers_ties_without_enlarging_the_support(hidden: str) -> None:
    answers = served(Stingy(ratio=0.4, hidden=hidden), torch.ones(3, 5))  # type: ignore[arg-type]
    assert (answers.exp() > 0.2 + 1e-3).sum(dim=1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("hidden", ["minus-infinity", "zero"])
def test_of_equal_classes_stingy_reveals_the_first_and_so_keeps_the_label(hidden: str) -> None:
    z = torch.rand(64, 10).sort(dim=1).values[:, torch.randperm(10)].clamp_max(0.5) + 1
    answers = served(Stingy(ratio=0.1, hidden=hidden), z)  # type: ignore[arg-type]
    assert torch.equal(answers.argmax(dim=1), z.argmax(dim=1))


def test_stingy_ignores_a_constant_added_to_all_logits() -> None:
    z = rows(10).double()
    torch.testing.assert_close(served(Stingy(), z + 7), served(Stingy(), z))


def test_stingy_with_all_classes_is_no_defense() -> None:
    z = rows(10)
    assert torch.equal(served(Stingy(ratio=1.0), z), z.log_softmax(dim=1))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_stingy_with_one_class_is_the_label_at_any_temperature(temperature: float) -> None:
    z = rows(10)
    one_hot = F.one_hot(z.argmax(dim=1), 10).float()
    assert torch.equal(soften(served(Stingy(ratio=0.1), z), temperature), one_hot)


def test_stingy_with_zeros_softens_the_logits_with_zeros_in_place_of_the_hidden_ones() -> None:
    answers = served(Stingy(ratio=0.5, hidden="zero"), S)
    torch.testing.assert_close(soften(answers, 4.0), soften(torch.tensor([[1.0, 2.0, 0.0, 0.0]]).double(), 4.0))
    risen = served(Stingy(ratio=0.5, hidden="zero"), -1 - T.abs())
    assert risen.argmax(dim=1).item() not in T.abs().topk(2, largest=False).indices


def test_stingy_deploys_the_victim_itself(victim: nn.Module, data: Split) -> None:
    assert Stingy().harden(victim, context(data)) is victim


# Adversarial Sparse Teacher


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


def test_ast_asks_the_twin_without_gradient_or_trace(data: Split, victim: nn.Module) -> None:
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
    assert same(state(hardened), state(plain(data)))
    assert buffers(hardened)


@pytest.mark.parametrize(
    "change", [{"divergence": "kl"}, {"pairing": "random"}, {"space": "normalised"}, {"alpha": 0.0}]
)
def test_ast_variants_train_different_twins(change: dict[str, object], victim: nn.Module, data: Split) -> None:
    defense = AdversarialSparse(iterations=3, alpha=0.5)
    changed = replace(defense, **change)  # type: ignore[arg-type]
    assert not same(state(defense.harden(victim, context(data))), state(changed.harden(victim, context(data))))


def test_ast_pulls_clean_answers_towards_the_sparse_ones(victim: nn.Module, data: Split) -> None:
    defense = AdversarialSparse(alpha=0.3, divergence="kl", eps=0.1, iterations=10)
    images = defense.perturb(victim, context(data))
    distance = [
        defense.distance(predict_logits(net, data.x), defense.sparse(net, images))
        for net in (defense.harden(victim, context(data, epochs=8)), plain(data, epochs=8))
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
    images = AdversarialSparse(eps=eps, iterations=iterations).perturb(victim, context(data))
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
    images = AdversarialSparse(step=0.02, iterations=1).perturb(victim, context(data))
    victim.eval()
    expected = (data.x + 0.02 * gradient_sign(victim, data.x, data.y)).clamp(0, 1)
    torch.testing.assert_close(images, expected)


def test_pgd_in_normalised_space_clamps_as_the_release_does(victim: nn.Module, data: Split) -> None:
    mean, std = data.x.mean(), data.x.std(correction=0)
    images = AdversarialSparse(space="normalised", step=0.02, iterations=1).perturb(victim, context(data))
    units = (data.x - mean) / std + 0.02 * gradient_sign(victim, data.x, data.y)
    torch.testing.assert_close(images, units.clamp(0, 1) * std + mean)
    assert ((images - data.x).abs().amax(dim=(1, 2, 3)) > 0.3 * std).all()  # the clamp moves more than eps does


def test_pgd_in_normalised_space_gives_pixels_whatever_the_channels(data: Split) -> None:
    bright = (torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.9).float()  # mean + std > 1
    flat = torch.full_like(bright, 0.5)
    coloured = replace(data, x=torch.cat([data.x, bright, flat], dim=1))
    ctx = context(coloured)
    images = AdversarialSparse(space="normalised", iterations=2).perturb(ctx.new_student(), ctx)
    assert images.min() >= 0
    assert images.max() <= 1


# Defensive distillation


class Shares(Log):
    """Writes down how far each fit is after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def progress(self, share: float, text: str) -> None:
        self.shares.append(share)


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


# What the laws compare with


def plain(data: Split, epochs: int = 2, seed: int = 0) -> nn.Module:
    """A network trained on the labels alone, with the draws that a defense would make."""
    ctx = context(data, epochs=epochs, seed=seed)
    net = ctx.new_student()
    fit(net, F.cross_entropy, data.x, data.y, ctx)
    return net


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


def gradient_sign(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return gradient(F.cross_entropy(net(x), y), x).sign()


def gradient(value: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(value, by)[0]
