"""KD over a grid: what it holds out, tries and chooses."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import accuracy, blobs, context, equal, taught, undefended
from kdbench.api import (
    Access,
    Attack,
    Context,
    Diverged,
    KdbenchError,
    Oracle,
    Scenario,
    Service,
    Split,
    fit,
    predict_logits,
)
from kdbench.attacks.kd import KD
from kdbench.attacks.kd_grid import KDGrid, hold_out

EPOCHS, IMAGES = 2, 96


HELD = 9  # a tenth of 32 images of each of three classes


GRID = KDGrid(temperatures=(4.0, 1.0), alphas=(0.9, 0.1))


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


def answering(service: Service, model: nn.Module) -> Oracle:
    return Oracle(service, Scenario(), model)


def asked(attack: Attack, data: Split, victim: nn.Module) -> int:
    oracle = oracle_on(victim)
    attack.steal(oracle, context(data, EPOCHS))
    return oracle.answered


@pytest.mark.parametrize("queries", ["augmented", "once"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_a_grid_of_one_point_is_kd(queries: Any, labelled: bool, data: Split, victim: nn.Module) -> None:
    subset = data if labelled else data.without_labels()
    grid = KDGrid(temperatures=(2.0,), alphas=(0.7,), queries=queries)
    ours, theirs = (
        attacker.steal(oracle_on(victim), context(subset))
        for attacker in (grid, KD(temperature=2.0, alpha=0.7, queries=queries))
    )
    assert equal(ours, theirs)


def test_a_grid_asks_about_every_batch_of_every_candidate_and_of_the_winner(data: Split, victim: nn.Module) -> None:
    candidates = 4 * EPOCHS * (IMAGES - HELD)
    assert asked(GRID, data, victim) == candidates + EPOCHS * IMAGES


def test_without_labels_a_grid_has_temperatures_alone_and_asks_about_what_is_held_out(
    data: Split, victim: nn.Module
) -> None:
    assert GRID.grid(labelled=False) == [(4.0, 1.0), (1.0, 1.0)]
    held = round(0.1 * IMAGES)
    candidates = 2 * EPOCHS * (IMAGES - held)
    assert asked(GRID, data.without_labels(), victim) == held + candidates + EPOCHS * IMAGES


def test_the_winner_is_the_point_that_did_best_on_what_was_held_out(data: Split, victim: nn.Module) -> None:
    ctx = context(data, epochs=8)
    replace(GRID, held_out=0.3).steal(answering(shifted(victim), victim), ctx)
    numbers = ctx.log.numbers
    scores = {point: numbers["validation_T{:g}_alpha{:g}".format(*point)] for point in GRID.grid(labelled=True)}
    assert len(set(scores.values())) > 1
    assert (numbers["chosen_temperature"], numbers["chosen_alpha"]) == max(scores, key=lambda point: scores[point])
    assert numbers["chosen_alpha"] == 0.1  # of wrong answers, the less the better


def test_without_labels_the_winner_agrees_with_the_oracle(data: Split, victim: nn.Module) -> None:
    ctx = context(data.without_labels(), epochs=10)
    student = replace(GRID, queries="once").steal(answering(shifted(victim), victim), ctx)
    numbers = ctx.log.numbers
    assert max(numbers[f"validation_T{T}_alpha1"] for T in (1, 4)) > 0.9  # though every answer is wrong
    assert accuracy(student, replace(data, y=(data.y + 1) % 3)) > 0.9
    assert numbers["chosen_alpha"] == 1.0


def test_of_equals_the_earlier_wins(data: Split, victim: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def undecided(_: nn.Module, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)  # every candidate says the same of everything

    monkeypatch.setattr("kdbench.attacks.kd_grid.predict_logits", undecided)
    for temperatures in ((4.0, 3.0), (3.0, 4.0)):
        ctx = context(data, epochs=1)
        KDGrid(temperatures=temperatures, alphas=(0.9,)).steal(oracle_on(victim), ctx)
        assert [ctx.log.numbers[f"validation_T{T:g}_alpha0.9"] for T in temperatures] == pytest.approx([1 / 3, 1 / 3])
        assert ctx.log.numbers["chosen_temperature"] == temperatures[0]


def test_a_candidate_that_diverges_costs_its_own_point_alone(data: Split, victim: nn.Module) -> None:
    ctx = context(data, epochs=10)
    student = KDGrid(temperatures=(1e30, 4.0), alphas=(0.9,)).steal(oracle_on(victim), ctx)
    assert ctx.log.numbers["validation_T1e+30_alpha0.9"] == 0.0
    assert ctx.log.numbers["chosen_temperature"] == 4.0
    assert predict_logits(student, data.x).isfinite().all()
    with pytest.raises(Diverged):
        KDGrid(temperatures=(1e30, 1e31), alphas=(0.9,)).steal(oracle_on(victim), context(data))


def test_kd_as_it_is_comes_first_in_the_default_grid() -> None:
    assert KDGrid().grid(labelled=True)[0] == (KD().temperature, KD().alpha)
    assert len(KDGrid().grid(labelled=True)) == 9
    assert KDGrid(temperatures=(4.0, 4.0), alphas=(0.5,)).grid(labelled=True) == [(4.0, 0.5)]


def test_candidates_start_from_equal_weights_and_see_nothing_that_is_held_out(
    data: Split, victim: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[nn.Module, Tensor, Tensor]] = []

    def watched(model: nn.Module, loss: Any, x: Tensor, target: Any, ctx: Context) -> None:
        started.append((copy.deepcopy(model), x, target[1]))
        fit(model, loss, x, target, ctx)

    monkeypatch.setattr("kdbench.attacks.kd_grid.fit", watched)
    GRID.steal(oracle_on(victim), context(data, EPOCHS))
    *candidates, winner = started
    assert len(candidates) == 4
    assert all(equal(model, winner[0]) for model, _, _ in candidates)
    assert all(torch.equal(x, candidates[0][1]) for _, x, _ in candidates)  # all are scored on the same
    assert all(y.bincount().tolist() == [29, 29, 29] for _, _, y in candidates)
    assert torch.equal(winner[1], data.x)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_of_each_class_a_share_is_held_out_at_least_one_and_not_all(share: float) -> None:
    y = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [4])[
        torch.randperm(53, generator=torch.Generator().manual_seed(0))
    ]
    chosen = hold_out(y, share, torch.Generator().manual_seed(0))
    held = y[chosen].bincount(minlength=5).tolist()
    assert held == [min(max(1, round(share * n)), n - 1) if n else 0 for n in (40, 10, 2, 0, 1)]
    assert torch.equal(chosen, hold_out(y, share, torch.Generator().manual_seed(0)))
    if share == 0.5:
        assert not torch.equal(chosen, hold_out(y, share, torch.Generator().manual_seed(1)))


def test_where_nothing_can_be_held_out_it_says_so(data: Split, victim: nn.Module) -> None:
    lonely = data.take(torch.tensor([0, 1, 2]))
    with pytest.raises(KdbenchError, match="nothing to choose by"):
        GRID.steal(oracle_on(victim), context(lonely))


@pytest.mark.parametrize("empty", [{"temperatures": ()}, {"alphas": ()}], ids=str)
def test_a_grid_of_no_points_is_refused(empty: dict[str, Any]) -> None:
    with pytest.raises(KdbenchError, match="at least one temperature and one alpha"):
        KDGrid(**empty)
