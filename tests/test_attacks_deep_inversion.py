"""DeepInversion: the images, and how they are found."""

from dataclasses import replace

import pytest
import torch
from inversions import ADAPTIVE, SMALL, attacker, hooks, oracle_on
from torch import Tensor, nn

from helpers import blobs, context, equal, taught, undefended
from kdbench.api import (
    Access,
    Context,
    KdbenchError,
    Oracle,
    Scenario,
    Split,
    jensen_shannon,
    predict_logits,
    soften,
)
from kdbench.attacks._features import Features
from kdbench.attacks.deep_inversion import DeepInversion, Objective
from kdbench.attacks.kd import KD
from kdbench.game.methods import Log


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


# DeepInversion: the images


def test_the_inversion_leaves_the_victim_as_it_was(data: Split, victim: nn.Module) -> None:
    class Remembering(Oracle):
        def model(self) -> nn.Module:
            handed.append(super().model())
            return handed[-1]

    handed: list[nn.Module] = []
    ADAPTIVE.steal(Remembering(undefended(victim), Scenario(access=Access.WEIGHTS), victim), attacker(ADAPTIVE, data))
    assert len(handed) == 1
    assert equal(handed[0], victim)
    assert hooks(handed[0]) == 0
    assert all(p.grad is None and not p.requires_grad for p in handed[0].parameters())
    assert not handed[0].training


def test_the_best_images_are_kept_though_the_last_are_worse(
    data: Split, victim: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def worsening(objective: Objective, u: Tensor, y: Tensor) -> Tensor:
        seen.append(u.detach().clone())
        away = abs(len(seen) - 3)  # the third of the iterates is the best
        return torch.stack([1000.0 * away + u.sum(), torch.tensor(float(len(seen)))])

    monkeypatch.setattr(Objective, "__call__", worsening)
    attack = replace(SMALL, jitter=0)
    with Features(victim) as features:
        images, losses = attack._invert(0, Objective(attack, features, None, context(data)), attacker(attack, data))
    assert len(seen) == attack.iterations
    torch.testing.assert_close(images, 0.5 + 0.25 * seen[2], rtol=0, atol=0)
    assert float(losses[1]) == 3
    assert not torch.equal(seen[2], seen[-1])


def test_the_loss_that_is_written_down_is_that_of_the_images_that_are_kept(data: Split, victim: nn.Module) -> None:
    attack = replace(SMALL, jitter=0, iterations=30, lr=1.0)
    with Features(victim) as features:
        objective = Objective(attack, features, None, context(data))
        images, losses = attack._invert(0, objective, attacker(attack, data))
        torch.testing.assert_close(objective((images - 0.5) / 0.25, torch.arange(24) % 3), losses)


def test_an_inversion_lowers_what_it_minimises(data: Split, victim: nn.Module) -> None:
    def final(iterations: int) -> Tensor:
        attack = replace(SMALL, jitter=0, iterations=iterations)
        with Features(victim) as features:
            return attack._invert(0, Objective(attack, features, None, context(data)), attacker(attack, data))[1]

    start, end = final(1), final(60)
    assert end[0] < 0.3 * start[0]
    assert end[1] < 0.3 * start[1]


def test_images_stay_in_the_unit_cube_however_long_the_steps(data: Split, victim: nn.Module) -> None:
    ctx, shown = showing(attacker(SMALL, data))
    replace(SMALL, lr=50.0).steal(oracle_on(victim), ctx)
    assert shown["inverted"].amin() == 0
    assert shown["inverted"].amax() == 1


def test_competition_makes_images_on_which_victim_and_competing_student_differ(data: Split, victim: nn.Module) -> None:
    competing_student = KD().steal(oracle_on(victim), context(data, epochs=6))

    def divergence(competition: float) -> float:
        attack = replace(SMALL, iterations=40, competition=competition)
        with torch.enable_grad(), Features(victim) as features:
            x, _ = attack._invert(
                0, Objective(attack, features, competing_student, context(data)), attacker(attack, data)
            )
        return float(
            jensen_shannon(soften(predict_logits(victim, x), 3.0), soften(predict_logits(competing_student, x), 3.0))
        )

    assert divergence(100.0) > 2 * divergence(0.0)


def test_the_images_are_rolled_both_ways_up_to_the_jitter(data: Split) -> None:
    shifts = torch.tensor(DeepInversion(jitter=2)._shifts(context(data)))
    assert shifts.shape == (2000, 2)
    assert [column.unique().tolist() for column in shifts.T] == [[-2, -1, 0, 1, 2]] * 2
    assert not torch.equal(shifts[:, 0], shifts[:, 1])
    assert DeepInversion(jitter=0, iterations=2)._shifts(context(data)) == [[0, 0], [0, 0]]


def test_a_victim_without_batch_norm_is_inverted_without_its_term(data: Split) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    ctx = attacker(SMALL, data)
    SMALL.steal(oracle_on(plain), ctx)
    assert ctx.log.numbers["batch_norm_layers"] == 0
    assert ctx.log.numbers["feature_loss"] == 0
    assert ctx.log.numbers["inversion_loss"] > 0


def test_an_inversion_that_diverges_says_so(data: Split) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * torch.nan

    with pytest.raises(KdbenchError, match="the inversion diverged"):
        SMALL.steal(oracle_on(Broken()), attacker(SMALL, data))


class Showing(Log):
    """Keeps the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, Tensor] = {}

    def images(self, name: str, x: Tensor, labels: Tensor | None = None) -> None:
        assert labels is not None
        self.shown |= {name: x, f"{name}.labels": labels}


def showing(ctx: Context) -> tuple[Context, dict[str, Tensor]]:
    log = Showing()
    return replace(ctx, log=log), log.shown
