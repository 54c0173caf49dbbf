"""Thieves who bring their own simulation, pool or generator: the formulas as numbers, who asks what and how often."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import blobs, context
from kdbench import testing
from kdbench.api import (
    Access,
    Attack,
    Context,
    DataSubset,
    Defense,
    KdbenchError,
    Oracle,
    Refused,
    Scenario,
    Split,
    fit,
    keep_top,
    kl,
    predict_logits,
    soft_cross_entropy,
    soften,
)
from kdbench.attacks._transforms import noisy, reverse_sigmoid, rounded
from kdbench.attacks.denoise import Denoise, granted
from kdbench.attacks.dfme import DFME, GeneratorStudentGame, as_images, generator, slope
from kdbench.attacks.kd import KD
from kdbench.attacks.knockoff import Knockoff, QueryCampaign, clustered, rescaled, rewards
from kdbench.defenses.gaussian_noise import GaussianNoise, renormalised
from kdbench.defenses.reverse_sigmoid import ReverseSigmoid
from kdbench.defenses.rounding import Rounding
from kdbench.defenses.top_k import TopK
from kdbench.engine.stage_log import StageLog, Stopped
from kdbench.testing import check_attack
from kdbench.training.fused import FusedTraining

T = torch.tensor([[3.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
EPOCHS, IMAGES = 2, 96
DENOISE = Denoise(examples=256, epochs=5)
RANDOM = Knockoff(surrogate="patterns", queries=80, batch=32, clusters=6)
ADAPTIVE = replace(RANDOM, policy="adaptive")
GAME = DFME(queries=4 * 16 * 7, batch=16, width=4, noise=8)
ALL: list[Attack] = [DENOISE, replace(DENOISE, queries="once"), RANDOM, ADAPTIVE, GAME]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    ctx = context(data, epochs=12, seed=1, model="mini-16")
    net = ctx.new_student()
    fit(net, F.cross_entropy, data.x, data.y, ctx)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def patterns() -> Tensor:
    """A pool of images that are like blobs, as photographs are like each other: 150 smooth ones, and as many grey ones."""
    return torch.cat([smooth(150), 0.5 + 0.01 * torch.rand(150, 1, 8, 8, generator=seed(6))])


def smooth(images: int) -> Tensor:
    """Images (N,1,8,8) of random colours, each pixel like its neighbours."""
    return F.interpolate(torch.rand(images, 1, 4, 4, generator=seed(5)), size=8)


def of(attack: Attack, data: Split, pool: Tensor, epochs: int = EPOCHS, seed: int = 0) -> Context:
    """A player who owns what `attack` says it does, and to whom `pool` is public."""
    return replace(context(attack.data_subset().of(data), epochs, seed), surrogate=lambda _: pool)


def oracle_on(model: nn.Module, budget: int | None = None, access: Access = Access.PROBS, topk: int = 5) -> Oracle:
    service = Defense().serve(model, context(blobs().train))
    return Oracle(service, Scenario(access=access, topk=topk, budget=budget), model)


def behind(defense: Defense, model: nn.Module) -> Oracle:
    return Oracle(defense.serve(model, context(blobs().train)), Scenario(), model)


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def accuracy(model: nn.Module, split: Split) -> float:
    return float((predict_logits(model, split.x).argmax(dim=1) == split.y).float().mean())


def name(attack: Attack) -> str:
    return "-".join([type(attack).__name__, *(str(getattr(attack, f, "")) for f in ("guess", "policy", "queries"))])


def rows(*size: int, seed: int = 0, scale: float = 5.0) -> Tensor:
    """Log-probabilities (N,K)."""
    z = torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (scale * z).log_softmax(dim=1)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# Laws of all


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_it_keeps_the_contract(attack: Attack, patterns: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Context] = testing._context
    monkeypatch.setattr(testing, "_context", lambda *given: replace(plain(*given), surrogate=lambda _: patterns))
    check_attack(attack)


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_it_hands_over_the_student_that_was_made_first_in_eval_mode(
    attack: Attack, data: Split, victim: nn.Module, patterns: Tensor
) -> None:
    ctx, made = remembering(of(attack, data, patterns))
    student = attack.steal(oracle_on(victim), ctx)
    assert student is made[0]  # paired: all start from the same weights
    assert not any(layer.training for layer in student.modules())


INTERRUPTIONS = [  # at checkpoints of each kind: of a round, of a lesson, of a training
    *((DENOISE, after) for after in (1, 2, 4, 7, 8, 9)),
    *((RANDOM, after) for after in (1, 2)),
    *((ADAPTIVE, after) for after in range(1, 8)),  # three rounds and two lessons, then two epochs
    *((GAME, after) for after in range(1, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "after"), INTERRUPTIONS, ids=str)
def test_an_interrupted_theft_goes_on_to_the_same_student(
    attack: Attack, after: int, data: Split, victim: nn.Module, patterns: Tensor, tmp_path: Path
) -> None:
    def play(stage_log: StageLog) -> tuple[nn.Module, int, dict[str, float]]:
        ctx = replace(of(attack, data, patterns), log=stage_log)
        stage_log.generators.append(ctx.generator)
        oracle = oracle_on(victim)
        metered = Oracle(oracle, Scenario(), victim, stage_log.query_counter)
        return attack.steal(metered, ctx), metered.answered, stage_log.numbers

    whole, asked, numbers = play(Interrupted(tmp_path / "whole", 0))
    with pytest.raises(Stopped):
        play(Interrupted(tmp_path / "parts", after))
    student, answered, resumed = play(Interrupted(tmp_path / "parts", 0))
    assert equal(student, whole)
    assert (answered, resumed) == (asked, numbers)


@pytest.mark.parametrize("attack", [RANDOM, ADAPTIVE, GAME], ids=name)
def test_it_owns_no_image(attack: Attack) -> None:
    assert attack.data_subset() == DataSubset(0.0)


def test_each_says_what_it_needs() -> None:
    assert (Denoise.needs, Knockoff.needs, DFME.needs) == (Access.TOPK, Access.LABEL, Access.PROBS)
    assert (Denoise.adaptive, Knockoff.adaptive, DFME.adaptive) == (True, False, False)


# Simulated transforms


@pytest.mark.parametrize(
    ("beta", "gamma", "expected"),
    [
        (1.0, 0.1, [0.657125, 0.135688, 0.098390, 0.108798]),
        (0.5, 0.2, [0.662639, 0.136338, 0.097661, 0.103362]),
    ],
)
def test_the_reverse_sigmoid_is_that_of_the_papers(beta: float, gamma: float, expected: list[float]) -> None:
    wanted = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(reverse_sigmoid(T.log_softmax(dim=1), beta, gamma).exp(), wanted, atol=6e-7, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 5.0, 300.0])
def test_a_simulated_transform_is_the_defense_of_its_name(scale: float) -> None:
    log_p = rows(50, 7, scale=scale)
    for beta, gamma in ((1.0, 0.1), (0.008, 0.2), (3.0, 2.0)):
        served = ReverseSigmoid(beta=beta, gamma=gamma).perturbed(log_p)
        torch.testing.assert_close(reverse_sigmoid(log_p, beta, gamma), served)
    for decimals in (1, 3, 9):
        torch.testing.assert_close(rounded(log_p, decimals), Rounding(decimals).rounded(log_p))
    drawn = torch.randn(50, 7, dtype=torch.float64, generator=seed())
    torch.testing.assert_close(noisy(log_p, 0.2, seed()), renormalised(log_p.exp() + 0.2 * drawn))


def test_what_rounds_to_nothing_is_its_label_alone() -> None:
    flat = torch.tensor([[0.04] * 24 + [0.0401]]).log().log_softmax(dim=1)
    assert rounded(flat, 1).exp().tolist() == [[0.0] * 24 + [1.0]]


def test_certain_answers_make_no_nans() -> None:
    certain = keep_top(rows(6, 4), 1)
    for made in replace(DENOISE, guess="mixture").simulated(certain, seed()):
        assert not made.isnan().any()
        torch.testing.assert_close(made.exp().sum(dim=1), torch.ones(6, dtype=torch.float64))


def test_a_mixture_is_all_guesses_together() -> None:
    clean = rows(9, 5)
    singles = [
        replace(DENOISE, guess=guess).simulated(clean, seed())
        for guess in ("rounding", "reverse-sigmoid", "noise", "top-k")
    ]
    assert [len(single) for single in singles] == [1, 1, 1, 1]
    mixture = DENOISE.simulated(clean, seed())
    assert all(torch.equal(single[0], mixed) for single, mixed in zip(singles, mixture, strict=True))
    assert len({tuple(mixed.flatten().tolist()) for mixed in mixture}) == 4
    assert torch.equal(mixture[3], keep_top(clean, DENOISE.k))


def test_strengths_are_those_of_the_fields() -> None:
    clean = rows(9, 5)
    attack = Denoise(decimals=1, beta=0.5, gamma=0.2, sigma=0.3, k=2)
    wanted = [rounded(clean, 1), reverse_sigmoid(clean, 0.5, 0.2), noisy(clean, 0.3, seed()), keep_top(clean, 2)]
    assert all(map(torch.equal, attack.simulated(clean, seed()), wanted))


# Denoising


def test_examples_are_clean_answers_with_their_classes_in_another_order() -> None:
    clean = rows(20, 6)
    examples = replace(DENOISE, examples=500).drawn(clean, seed())
    assert examples.shape == (500, 6)
    known = {tuple(row) for row in clean.sort(dim=1).values.tolist()}
    assert {tuple(row) for row in examples.sort(dim=1).values.tolist()} == known
    assert examples.argmax(dim=1).bincount(minlength=6).min() > 40  # whatever the answers' own tops are


def test_what_the_grant_withholds_is_withheld_in_the_simulation_too() -> None:
    log_p = rows(5, 6)
    assert torch.equal(granted(log_p, Scenario(access=Access.TOPK, topk=2)), keep_top(log_p, 2))
    assert granted(log_p, Scenario(access=Access.PROBS, topk=2)) is log_p


@pytest.mark.parametrize("guess", ["rounding", "reverse-sigmoid", "noise", "top-k", "mixture"])
def test_a_denoiser_undoes_what_it_was_shown(guess: Any, data: Split) -> None:
    attack = Denoise(guess=guess, decimals=1, k=2, examples=1000, epochs=20)
    held_out, ctx = rows(300, 4, seed=1).float(), context(data, EPOCHS)
    denoise = attack._denoiser(rows(300, 4).float(), Scenario(), ctx)
    numbers = ctx.log.numbers
    assert numbers["denoised_kl"] < 0.5 * numbers["perturbed_kl"]
    for given in attack.simulated(held_out, seed(1)):  # answers it has not seen
        said = denoise(given)
        torch.testing.assert_close(said.exp().sum(dim=1), torch.ones(300))
        assert kl(held_out.exp(), said) < 0.5 * kl(held_out.exp(), attack.clipped(given).log_softmax(dim=1))


@pytest.mark.parametrize(
    ("defense", "attack"),
    [
        (Rounding(decimals=1), Denoise(guess="rounding", decimals=1)),
        (GaussianNoise(sigma=0.3), Denoise(guess="noise", sigma=0.3)),
        (ReverseSigmoid(), Denoise(guess="reverse-sigmoid")),
        (TopK(k=1), Denoise(guess="top-k", k=1)),
        (GaussianNoise(sigma=0.3), Denoise(sigma=0.3)),
    ],
    ids=str,
)
def test_it_learns_more_of_a_defended_victim_than_kd(
    defense: Defense, attack: Denoise, data: Split, victim: nn.Module
) -> None:
    def distance(attacker: Attack) -> float:
        student = attacker.steal(behind(defense, victim), context(data, epochs=15))
        return float(kl(truth.exp(), predict_logits(student, blobs().test.x).log_softmax(dim=1)))

    truth = predict_logits(victim, blobs().test.x).log_softmax(dim=1)
    assert distance(replace(attack, examples=2000)) < 0.6 * distance(KD())


def test_of_an_undefended_victim_it_learns_all_the_same(data: Split, victim: nn.Module) -> None:
    for subset in (data, data.without_labels()):
        student = replace(DENOISE, examples=2000).steal(oracle_on(victim), context(subset, epochs=20))
        assert accuracy(student, blobs().validation) > 0.9


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_truncated_answers_and_unknown_labels_leave_it_a_student_that_answers(
    labelled: bool, topk: int, data: Split, victim: nn.Module
) -> None:
    subset = data if labelled else data.without_labels()
    student = DENOISE.steal(oracle_on(victim, access=Access.TOPK, topk=topk), context(subset, EPOCHS))
    assert predict_logits(student, data.x).isfinite().all()


@pytest.mark.parametrize(
    ("queries", "labelled", "asked"),
    [
        ("once", True, IMAGES),
        ("once", False, IMAGES),
        ("augmented", True, EPOCHS * IMAGES),
        ("augmented", False, (EPOCHS + 1) * IMAGES),  # once more, for the labels of the shadow
    ],
)
def test_the_shadow_and_the_denoiser_ask_nothing_but_unknown_labels(
    queries: Any, labelled: bool, asked: int, data: Split, victim: nn.Module
) -> None:
    subset, attack = data if labelled else data.without_labels(), replace(DENOISE, queries=queries)
    exact = oracle_on(victim, asked)
    attack.steal(exact, context(subset, EPOCHS))
    assert exact.left == 0
    with pytest.raises(Refused, match="left"):
        attack.steal(oracle_on(victim, asked - 1), context(subset, EPOCHS))


def test_shadows_are_named_and_each_learns_the_thiefs_images(data: Split, victim: nn.Module) -> None:
    attack = replace(DENOISE, shadows=("mini-16", "", "mini-32"))
    ctx, made = remembering(context(data, epochs=15))
    attack.steal(oracle_on(victim), ctx)
    assert attack.networks() == ("mini-16", "mini-32")
    assert [net.classifier.in_features for net in made] == [16, 32, 16, 64]
    assert all(accuracy(net, data) > 0.9 for net in made)


def test_no_shadow_is_refused() -> None:
    with pytest.raises(KdbenchError, match="at least one network"):
        Denoise(shadows=())


def test_denoisers_in_company_learn_what_they_learn_alone(data: Split, victim: nn.Module) -> None:
    def stolen(fused: FusedTraining | None, number: int, out: dict[int, Tensor]) -> None:
        ctx = replace(context(data, seed=number), fused=fused)
        out[number] = predict_logits(DENOISE.steal(oracle_on(victim), ctx), data.x)

    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}
    for number in (0, 1):
        stolen(None, number, alone)
    fused = FusedTraining()
    fused.run([lambda s=number: stolen(fused, s, together) for number in (0, 1)])  # type: ignore[misc]
    for number in (0, 1):
        torch.testing.assert_close(together[number], alone[number], atol=1e-3, rtol=1e-3)


# Knockoff nets


def test_the_loss_of_a_knockoff_is_the_soft_cross_entropy() -> None:
    z, log_p = rows(8, 5).requires_grad_(), rows(8, 5, seed=1)
    (gradient,) = torch.autograd.grad(Knockoff().loss(z, log_p), z)
    (wanted,) = torch.autograd.grad(soft_cross_entropy(z, log_p.exp()), z)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("attack", [RANDOM, ADAPTIVE], ids=name)
@pytest.mark.parametrize(("budget", "images", "asked"), [(None, 300, 80), (50, 300, 50), (None, 70, 70), (33, 40, 33)])
def test_it_asks_about_as_many_images_as_queries_pool_and_budget_allow_each_once(
    attack: Knockoff, budget: int | None, images: int, asked: int, data: Split, victim: nn.Module, patterns: Tensor
) -> None:
    seen: list[Tensor] = []
    oracle = oracle_on(victim, budget)

    def service(x: Tensor) -> Tensor:
        seen.append(x)
        return oracle(x)

    ctx = of(attack, data, patterns.flip(0)[:images])
    attack.steal(Oracle(service, Scenario(budget=budget), victim), ctx)
    x = {tuple(image.flatten().tolist()) for image in torch.cat(seen)}
    assert sum(map(len, seen)) == len(x) == asked == ctx.log.numbers["asked"]
    assert x <= {tuple(image.flatten().tolist()) for image in patterns}


def test_the_pool_is_the_public_data_set_of_that_name(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    wanted: list[str] = []

    def surrogate(name: str) -> Tensor:
        wanted.append(name)
        return patterns

    RANDOM.steal(oracle_on(victim), replace(of(RANDOM, data, patterns), surrogate=surrogate))
    assert tuple(wanted) == RANDOM.surrogate_datasets() == ("patterns",)


def test_an_empty_pool_says_so(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    with pytest.raises(KdbenchError, match="nothing to ask: the pool 'patterns'"):
        RANDOM.steal(oracle_on(victim), of(RANDOM, data, patterns[:0]))


@pytest.mark.parametrize("answers", [Access.PROBS, Access.TOPK, Access.LABEL])
@pytest.mark.parametrize("policy", ["random", "adaptive"])
def test_a_student_of_another_data_set_knows_the_victims(
    policy: Any, access: Access, data: Split, victim: nn.Module
) -> None:
    attack = replace(RANDOM, policy=policy, queries=400)
    student = attack.steal(oracle_on(victim, access=access, topk=2), of(attack, data, smooth(600), epochs=20))
    assert accuracy(student, blobs().test) > 0.9


def test_the_adaptive_thief_finds_the_images_that_tell_something(
    data: Split, victim: nn.Module, patterns: Tensor
) -> None:
    def share(policy: Any) -> float:
        seen: list[Tensor] = []
        service = Defense().serve(victim, context(data))

        def noted(x: Tensor) -> Tensor:
            seen.append(x)
            return service(x)

        attack = replace(RANDOM, policy=policy, queries=120, batch=8)
        for number in range(3):
            attack.steal(Oracle(noted, Scenario(), victim), of(attack, data, patterns, seed=number))
        return float((torch.cat(seen).flatten(1).std(dim=1) > 0.05).float().mean())  # the others are grey

    assert share("adaptive") > share("random") + 0.15


def test_rewards_are_margin_novelty_and_loss_each_from_0_to_1() -> None:
    log_p, z = rows(12, 5, scale=1.0), rows(12, 5, seed=1)
    p, mean = log_p.exp(), log_p.exp().mean(dim=0)
    certainty = [float(row.max() - row.sort().values[-2]) for row in p]
    diversity = [sum(max(0.0, float(a - b)) for a, b in zip(row, mean, strict=True)) for row in p]
    loss = [-float((row * other).sum()) for row, other in zip(p, z, strict=True)]
    wanted = torch.zeros(12, dtype=torch.float64)
    for values in (certainty, diversity, loss):
        least, greatest = min(values), max(values)
        wanted += torch.tensor([(v - least) / (greatest - least) for v in values], dtype=torch.float64)
    torch.testing.assert_close(rewards(log_p, z), wanted)


def test_what_is_equal_for_all_pays_nobody() -> None:
    assert rescaled(torch.full((4,), 0.3)).tolist() == [0, 0, 0, 0]
    assert rescaled(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0, 1, 0.5]


def test_the_bandit_moves_as_gradient_bandits_do(data: Split) -> None:
    start = torch.tensor([0.3, -0.2, 0.0, 0.1])
    kind, reward = torch.tensor([1, 0, 1, 3]), torch.tensor([0.9, 0.1, 0.5, 0.3])
    campaign = replace(QueryCampaign.new(4, context(data)), preference=start, draws=torch.tensor([2.0, 0.0, 0.0, 1.0]))
    grown = campaign.grown(torch.arange(4), torch.zeros(4, 3), kind, reward)
    draws, pi, wanted = [3, 2, 0, 2], start.softmax(dim=0).tolist(), start.tolist()
    for action, r in zip(kind.tolist(), reward.tolist(), strict=True):
        for z in range(4):
            wanted[z] += (r - float(reward.mean())) / draws[action] * ((1 - pi[z]) if z == action else -pi[z])
    assert grown.draws.tolist() == draws
    torch.testing.assert_close(grown.preference, torch.tensor(wanted))


def test_kinds_are_drawn_by_preference_until_they_are_used_up(data: Split) -> None:
    kind = torch.tensor([0] * 30 + [1] * 300 + [2] * 300)
    campaign = replace(QueryCampaign.new(3, context(data)), preference=torch.tensor([40.0, 0.0, 0.0]))
    first = campaign.draw(kind, 20, seed())
    assert kind[first].tolist() == [0] * 20
    campaign = replace(campaign, index=first)
    then = campaign.draw(kind, 50, seed())
    assert (kind[then] == 0).sum() == 10  # all that is left of it
    assert len({*first.tolist(), *then.tolist()}) == 70
    even = replace(campaign, preference=torch.tensor([-40.0, 0.0, 1.0]), index=then[:0])
    drawn = torch.cat([kind[even.draw(kind, 3, seed(number))] for number in range(300)]).bincount(minlength=3)
    assert drawn[0] == 0
    assert float(drawn[2] / drawn.sum()) == pytest.approx(math.e / (1 + math.e), abs=0.05)


def test_the_surrogate_learns_each_batch_but_the_last_once(
    data: Split, victim: nn.Module, patterns: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[tuple[nn.Module, int, int]] = []

    def watched(model: nn.Module, loss: Any, x: Tensor, target: Any, ctx: Context) -> None:
        lessons.append((model, len(x), ctx.recipe.epochs))
        fit(model, loss, x, target, ctx)

    monkeypatch.setattr("kdbench.attacks.knockoff.fit", watched)
    ctx, made = remembering(of(ADAPTIVE, data, patterns))
    ADAPTIVE.steal(oracle_on(victim), ctx)
    student, surrogate = made
    assert lessons == [(surrogate, 32, 1), (surrogate, 32, 1), (student, 80, EPOCHS)]


def test_clusters_are_found() -> None:
    centres = 10 * torch.eye(4)
    truth = torch.arange(200) % 4
    found = clustered(centres[truth] + 0.1 * torch.randn(200, 4, generator=seed()), 12, seed(1))
    assert all(len(truth[found == cluster].unique()) <= 1 for cluster in range(12))
    assert len(found.unique()) > 4
    assert clustered(centres, 4, seed()).sort().values.tolist() == [0, 1, 2, 3]


# Data-free model extraction


def test_recovered_logits_are_the_victims_own_less_their_mean() -> None:
    z = rows(6, 5, scale=2.0) + 3.0
    attack = DFME()
    torch.testing.assert_close(attack.recovered(z.log_softmax(dim=1)), z - z.mean(dim=1, keepdim=True))


def test_a_withheld_class_counts_as_the_floor() -> None:
    recovered = DFME(floor=1e-3).recovered(torch.tensor([[0.0, -torch.inf, -20.0]]))
    floor = math.log(1e-3)
    torch.testing.assert_close(recovered, torch.tensor([[0.0, floor, floor]]) - 2 * floor / 3)


def test_a_slope_in_one_dimension_is_a_forward_difference() -> None:
    u = torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None, None, None]
    estimate = slope(lambda x: x.flatten(1).square().sum(dim=1), u, 1, 1e-6, seed())
    torch.testing.assert_close(estimate, 2 * u, atol=2e-6, rtol=0)


def test_a_slope_is_the_gradient_on_average_each_point_its_own() -> None:
    weight = rows(2, 3)  # of two points, in three dimensions

    def linear(x: Tensor) -> Tensor:
        return (x.flatten(1) * weight.repeat(len(x) // 2, 1)).sum(dim=1)

    u = torch.zeros(2, 3, 1, 1, dtype=torch.float64)
    estimate = slope(linear, u, 40_000, 1e-3, seed()).flatten(1)
    torch.testing.assert_close(estimate, weight, atol=0.02 * float(weight.norm()), rtol=0)
    once = slope(linear, u, 1, 1e-3, seed()).flatten(1)
    assert (once - weight).norm() > 0.1 * weight.norm()  # one direction tells little


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 28, 28), (1, 7, 9), (1, 2, 3), (3, 64, 64)], ids=str)
def test_a_generator_makes_images_of_any_shape(shape: tuple[int, int, int]) -> None:
    net = generator(16, 4, shape)
    x = as_images(net(100 * torch.randn(5, 16, generator=seed())))
    assert x.shape == (5, *shape)
    assert x.min() >= 0
    assert x.max() <= 1
    assert (x.amax(dim=0) - x.amin(dim=0)).min() > 0  # every pixel depends on the noise


@pytest.mark.parametrize(("budget", "rounds"), [(None, 4), (447, 3), (448, 4), (10_000, 4), (112, 1)])
def test_it_plays_as_many_rounds_as_the_budget_has_room_for(
    budget: int | None, rounds: int, data: Split, victim: nn.Module, patterns: Tensor
) -> None:
    oracle, ctx = oracle_on(victim, budget), of(GAME, data, patterns)
    GAME.steal(oracle, ctx)
    assert oracle.answered == rounds * 16 * 7
    assert ctx.log.numbers["rounds"] == rounds


def test_every_probe_is_a_question(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    attack = replace(GAME, directions=3, steps=2)
    oracle = oracle_on(victim)
    attack.steal(oracle, of(attack, data, patterns))
    assert oracle.answered == (448 // (16 * 6)) * 16 * 6


def test_a_budget_below_one_round_says_so(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    oracle = oracle_on(victim, 111)
    with pytest.raises(KdbenchError, match="a round of 112 answers is more than the 111") as caught:
        GAME.steal(oracle, of(GAME, data, patterns))
    assert not isinstance(caught.value, Refused)
    assert oracle.answered == 0


def test_differences_are_not_taken_where_they_would_drown(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    ctx = replace(of(GAME, data, patterns), precision="bf16")
    with pytest.raises(KdbenchError, match="dfme needs precision fp32, not bf16"):
        GAME.steal(oracle_on(victim), ctx)


def test_a_batch_of_one_image_is_refused() -> None:
    with pytest.raises(KdbenchError, match="at least 2"):
        DFME(batch=1)


def test_the_generator_finds_images_on_which_a_fixed_student_is_wrong(
    data: Split, victim: nn.Module, patterns: Tensor
) -> None:
    attack = replace(GAME, batch=64, width=16, generator_lr=1e-2)
    game = GeneratorStudentGame(attack, oracle_on(victim), of(attack, data, patterns))
    before = gap(game)
    student = copy.deepcopy(game.student)
    for _ in range(60):
        game._train_generator()
    assert gap(game) > 1.2 * before
    assert equal(game.student, student)


def test_the_student_comes_nearer_on_the_generators_images(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    attack = replace(GAME, batch=64, width=16)
    game = GeneratorStudentGame(attack, oracle_on(victim), of(attack, data, patterns))
    first = float(game._train_student())
    for _ in range(60):
        last = float(game._train_student())
    assert last < 0.5 * first


def test_rates_fall_at_10_30_and_50_per_cent(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    game = GeneratorStudentGame(GAME, oracle_on(victim), of(GAME, data, patterns))
    for share, factor in ((0.0, 1), (0.09, 1), (0.1, 0.3), (0.3, 0.09), (0.49, 0.09), (0.5, 0.027), (0.99, 0.027)):
        game.round(share)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in (game._sgd, game._adam)]
        assert rates == pytest.approx([factor * GAME.lr, factor * GAME.generator_lr])


def test_a_student_that_saw_no_image_knows_them(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    attack = DFME(queries=60_000, batch=64, width=16, generator_lr=1e-3)
    student = attack.steal(oracle_on(victim), of(attack, data, patterns))
    assert accuracy(student, blobs().test) > 0.85
    told = predict_logits(victim, blobs().test.x).log_softmax(dim=1)
    blank = of(attack, data, patterns).new_student()
    near, far = (
        float(kl(soften(told, 1), predict_logits(net, blobs().test.x).log_softmax(dim=1))) for net in (student, blank)
    )
    assert near < 0.5 * far


def test_an_extraction_that_diverges_says_so(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    with pytest.raises(KdbenchError, match="diverged in round"):
        replace(GAME, lr=1e30).steal(oracle_on(victim), of(GAME, data, patterns))


def gap(game: GeneratorStudentGame) -> float:
    """How far student and victim are apart on the generator's images."""
    game.student.eval()
    x = torch.cat([game.images() for _ in range(4)])
    with torch.no_grad():
        return float((game.student(x) - game.attack.recovered(game._oracle(x))).abs().mean())


class Interrupted(StageLog):
    """Keeps a checkpoint at every chance, and stops at the one numbered `after` (0: never)."""

    def __init__(self, folder: Path, after: int) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder, folder)
        self._left = after

    def due(self) -> bool:
        self._left -= 1
        self.stop = self._left == 0
        return True


def remembering(ctx: Context) -> tuple[Context, list[Any]]:
    """The same context, and the networks it will have made."""
    made: list[Any] = []

    def new_student(name: str | None = None) -> nn.Module:
        network = ctx.new_student(name)
        made.append(network)
        return network

    return replace(ctx, new_student=new_student), made
