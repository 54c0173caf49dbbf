"""Knockoff: which images it asks about, its rewards, its bandit and its clusters."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import accuracy, blobs, context, remembering, taught
from kdbench.api import (
    Access,
    Attack,
    Context,
    Defense,
    KdbenchError,
    Oracle,
    Scenario,
    Split,
    fit,
    soft_cross_entropy,
)
from kdbench.attacks.knockoff import Knockoff, QueryCampaign, clustered, rescaled, rewards

EPOCHS, IMAGES = 2, 96


RANDOM = Knockoff(surrogate="patterns", queries=80, batch=32, clusters=6)


ADAPTIVE = replace(RANDOM, policy="adaptive")


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


@pytest.fixture(scope="module")
def patterns() -> Tensor:
    """Surrogate data: 150 smooth images, which are like blobs, and as many grey ones."""
    return torch.cat([smooth(150), 0.5 + 0.01 * torch.rand(150, 1, 8, 8, generator=seed(6))])


def smooth(images: int) -> Tensor:
    """Images (N,1,8,8) of random colours, each pixel like its neighbours."""
    return F.interpolate(torch.rand(images, 1, 4, 4, generator=seed(5)), size=8)


def of(attack: Attack, data: Split, surrogate: Tensor, epochs: int = EPOCHS, seed: int = 0) -> Context:
    """The context of an attacker with the images that `attack` declares, and with `surrogate` data."""
    return replace(context(attack.data_subset().of(data), epochs, seed), surrogate=lambda _: surrogate)


def oracle_on(model: nn.Module, budget: int | None = None, access: Access = Access.PROBS, topk: int = 5) -> Oracle:
    service = Defense().serve(model, context(blobs().train))
    return Oracle(service, Scenario(access=access, topk=topk, budget=budget), model)


def name(attack: Attack) -> str:
    return "-".join([type(attack).__name__, *(str(getattr(attack, f, "")) for f in ("guess", "policy", "queries"))])


def rows(*size: int, seed: int = 0, scale: float = 5.0) -> Tensor:
    """Log-probabilities (N,K)."""
    z = torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (scale * z).log_softmax(dim=1)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_the_loss_of_a_knockoff_is_the_soft_cross_entropy() -> None:
    z, log_p = rows(8, 5).requires_grad_(), rows(8, 5, seed=1)
    (gradient,) = torch.autograd.grad(Knockoff().loss(z, log_p), z)
    (wanted,) = torch.autograd.grad(soft_cross_entropy(z, log_p.exp()), z)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("attack", [RANDOM, ADAPTIVE], ids=name)
@pytest.mark.parametrize(("budget", "images", "asked"), [(None, 300, 80), (50, 300, 50), (None, 70, 70), (33, 40, 33)])
def test_it_asks_about_as_many_images_as_queries_surrogate_data_and_budget_allow_each_once(
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


def test_the_surrogate_data_are_those_of_that_name(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    wanted: list[str] = []

    def surrogate(name: str) -> Tensor:
        wanted.append(name)
        return patterns

    RANDOM.steal(oracle_on(victim), replace(of(RANDOM, data, patterns), surrogate=surrogate))
    assert tuple(wanted) == RANDOM.surrogate_datasets() == ("patterns",)


def test_empty_surrogate_data_say_so(data: Split, victim: nn.Module, patterns: Tensor) -> None:
    with pytest.raises(KdbenchError, match="nothing to ask: the data set 'patterns'"):
        RANDOM.steal(oracle_on(victim), of(RANDOM, data, patterns[:0]))


@pytest.mark.parametrize("access", [Access.PROBS, Access.TOPK, Access.LABEL])
@pytest.mark.parametrize("policy", ["random", "adaptive"])
def test_a_student_of_another_data_set_knows_the_victims(
    policy: Any, access: Access, data: Split, victim: nn.Module
) -> None:
    attack = replace(RANDOM, policy=policy, queries=400)
    student = attack.steal(oracle_on(victim, access=access, topk=2), of(attack, data, smooth(600), epochs=20))
    assert accuracy(student, blobs().test) > 0.9


def test_the_adaptive_attacker_finds_the_images_that_tell_something(
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


def test_the_second_network_learns_each_batch_but_the_last_once(
    data: Split, victim: nn.Module, patterns: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[tuple[nn.Module, int, int]] = []

    def watched(model: nn.Module, loss: Any, x: Tensor, target: Any, ctx: Context, name: str | None = None) -> None:
        epochs.append((model, len(x), ctx.recipe.epochs))
        fit(model, loss, x, target, ctx, name)

    monkeypatch.setattr("kdbench.attacks.knockoff.fit", watched)
    ctx, made = remembering(of(ADAPTIVE, data, patterns))
    ADAPTIVE.steal(oracle_on(victim), ctx)
    student, surrogate = made
    assert epochs == [(surrogate, 32, 1), (surrogate, 32, 1), (student, 80, EPOCHS)]


def test_clusters_are_found() -> None:
    centres = 10 * torch.eye(4)
    truth = torch.arange(200) % 4
    found = clustered(centres[truth] + 0.1 * torch.randn(200, 4, generator=seed()), 12, seed(1))
    assert all(len(truth[found == cluster].unique()) <= 1 for cluster in range(12))
    assert len(found.unique()) > 4
    assert clustered(centres, 4, seed()).sort().values.tolist() == [0, 1, 2, 3]
