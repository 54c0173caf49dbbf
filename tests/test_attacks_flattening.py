"""HTC, SCM and the averager: the papers' formulas as numbers, who asks what and how often, and that they undo defenses."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import S, T, Y, accuracy, blobs, context, equal, remembering, taught, undefended
from kdbench.api import (
    UNKNOWN,
    Access,
    KdbenchError,
    Oracle,
    QueryFunction,
    Scenario,
    Service,
    Split,
    kd,
    kl,
    soften,
)
from kdbench.attacks.averager import Averager, labels_or_top, mean_of_class
from kdbench.attacks.htc import HTC
from kdbench.attacks.kd import KD
from kdbench.attacks.scm import SCM
from kdbench.defenses.stingy import Stingy


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1, model="mini-16")


def inconsistent(model: nn.Module) -> Service:
    """Lies about two images of five, in ways that depend on the image."""

    def answer(x: Tensor) -> Tensor:
        log_p = undefended(model)(x)
        turn = (x.flatten(1).sum(dim=1) * 1e4).long() % 5
        wrong = torch.stack([log_p.roll(shift, dims=1) for shift in (0, 0, 0, 1, 2)])
        return wrong[turn, torch.arange(len(x))]

    return answer


def oracle_on(model: nn.Module, budget: int | None = None, access: Access = Access.TOPK, topk: int = 5) -> Oracle:
    return Oracle(undefended(model), Scenario(access=access, topk=topk, budget=budget), model)


def answering(service: Service, model: nn.Module) -> Oracle:
    return Oracle(service, Scenario(), model)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# High temperature composition


def test_the_loss_of_htc_is_that_of_the_unofficial_code() -> None:
    attack = HTC(temperature=50.0, alpha=0.9, multiplier=1.0)
    assert float(attack.loss(S, T, Y)) == pytest.approx(0.560071494, abs=1e-8)
    assert float(attack.loss(S, T, None)) == pytest.approx(0.456170338, abs=1e-8)
    assert float(attack.loss(S, T.log_softmax(dim=1), Y)) == pytest.approx(0.560071494, abs=1e-8)


def test_the_multiplier_of_htc_weighs_the_kl_alone() -> None:
    attack = HTC(alpha=0.9, multiplier=3.0)
    assert float(attack.loss(S, T, Y)) == pytest.approx(0.9 * 3 * 0.456170338 + 0.1 * 1.495181898, abs=1e-8)


def test_htc_is_kd_where_all_temperatures_are_one(data: Split, victim: nn.Module) -> None:
    tepid, one, hot = (
        attacker.steal(oracle_on(victim), context(data))
        for attacker in (HTC(temperature=1.0), KD(temperature=1.0), HTC())
    )
    assert equal(tepid, one)
    assert not equal(tepid, hot)


def test_a_very_high_temperature_is_label_smoothing() -> None:
    z, y = draw(8, 4), torch.arange(8) % 4
    smoothed = F.cross_entropy(z, y, label_smoothing=0.9)
    flat = HTC(temperature=1e9, alpha=0.9).loss(z, draw(8, 4, seed=1), y)
    uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
    entropy = float(-(uniform * uniform.log()).sum(dim=1).mean())
    assert float(flat) == pytest.approx(float(smoothed) - 0.9 * entropy, abs=1e-6)


# Contrastive models


def test_a_contrastive_model_minimises_what_the_nasty_teacher_does() -> None:
    assert float(SCM().contrast(S, (T, Y))) == pytest.approx(1.459950758, abs=1e-8)
    contradiction = float(SCM(omega=0.0).contrast(S, (T, Y)) - SCM(omega=1.0).contrast(S, (T, Y)))
    assert contradiction == pytest.approx(0.880778509, abs=1e-8)


def test_the_gradient_of_the_contradiction_is_that_of_the_nasty_teacher() -> None:
    z = S.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(SCM(omega=0.0).contrast(z, (T, Y)) - SCM(omega=1.0).contrast(z, (T, Y)), z)
    torch.testing.assert_close(
        gradient, torch.tensor([[-0.553382, 0.310387, 0.096378, 0.146617]]).double(), atol=1e-6, rtol=0
    )


def test_a_withheld_class_counts_as_the_floor() -> None:
    withheld = torch.tensor([[0.0, -1.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    floored = withheld.log_softmax(dim=1).where(withheld > -torch.inf, torch.tensor(1e-7).double().log())
    assert float(SCM().contrast(S, (withheld, Y))) == pytest.approx(float(SCM().contrast(S, (floored, Y))), abs=1e-6)
    assert SCM(floor=1e-3).contrast(S, (withheld, Y)) > SCM().contrast(S, (withheld, Y))  # a lower floor is farther off


def test_a_contradiction_is_bounded_by_the_floor() -> None:
    sure, opposed = torch.tensor([[900.0, 0.0]]).double(), torch.tensor([[0.0, 900.0]]).double()
    worst = SCM(omega=1.0, floor=1e-7).contrast(sure, (opposed, Y))
    assert float(worst) == pytest.approx(-16 * float(torch.tensor(1 + 1e7**0.25).log()), rel=1e-6)


def test_where_no_label_is_known_a_predecessors_top_answer_is_it() -> None:
    assert torch.equal(SCM().contrast(S, (T, torch.tensor([UNKNOWN]))), SCM().contrast(S, (T, Y)))  # T's top is 0
    y = torch.tensor([2, UNKNOWN])
    assert labels_or_top(torch.cat([T, S]), y).tolist() == [2, 1]


def test_the_ensemble_answers_the_mean_of_softened_probabilities() -> None:
    nets: list[QueryFunction] = [lambda x: S.expand(len(x), 4), lambda x: T.expand(len(x), 4)]
    x = torch.zeros(3, 1, 2, 2)
    mean = (soften(S, 4.0) + soften(T, 4.0)) / 2
    torch.testing.assert_close(soften(SCM(temperature=4.0).ensemble(nets)(x), 4.0), mean.expand(3, 4))
    torch.testing.assert_close(soften(SCM().ensemble(nets[:1])(x), 4.0), soften(S, 4.0).expand(3, 4))


def test_each_model_contradicts_its_predecessor_and_knows_the_labels(data: Split, victim: nn.Module) -> None:
    def contradictions(omega: float) -> list[float]:
        attack = SCM(models=("", ""), omega=omega)
        nets = [undefended(victim), *attack._sequence(oracle_on(victim), context(data, epochs=20))]
        z = [net(data.x) for net in nets]
        assert all((logits.argmax(dim=1) == data.y).float().mean() > 0.9 for logits in z)
        return [float(kl(soften(b, 4.0), (a / 4.0).log_softmax(dim=1))) for a, b in itertools.pairwise(z)]

    for nasty, mild in zip(contradictions(0.2), contradictions(0.0), strict=True):
        assert nasty > 5 * mild


def test_the_models_are_named_and_made_after_the_student(data: Split, victim: nn.Module) -> None:
    attack = SCM(models=("mini-16", "", "mini-32"))
    ctx, made = remembering(context(data))
    attack.steal(oracle_on(victim), ctx)
    assert attack.networks() == ("mini-16", "mini-32")
    assert [net.classifier.in_features for net in made] == [16, 32, 16, 64]


def test_a_sequence_of_none_is_refused() -> None:
    with pytest.raises(KdbenchError, match="at least one network"):
        SCM(models=())


# Averager


def test_a_class_says_what_it_says_on_average() -> None:
    values, y = draw(6, 3), torch.tensor([0, 2, 0, 2, 2, 1])
    mean = mean_of_class(values, y)
    torch.testing.assert_close(mean[0], (values[0] + values[2]) / 2)
    torch.testing.assert_close(mean[3], (values[1] + values[3] + values[4]) / 3)
    torch.testing.assert_close(mean[5], values[5])
    torch.testing.assert_close(mean[[1, 3, 4]], mean[[1, 1, 1]])
    torch.testing.assert_close(mean.sum(dim=0), values.sum(dim=0))  # nothing is added or lost


def test_log_probabilities_average_as_logits_do() -> None:
    z, y = 30 * draw(6, 3), torch.tensor([0, 2, 0, 2, 2, 1])
    assert z.log_softmax(dim=1).min() < -30  # what is revealed has no floor
    for t in (1.0, 20.0):
        mean = soften(mean_of_class(z, y), t)
        torch.testing.assert_close(soften(Averager().averaged(z.log_softmax(dim=1), y), t), mean)


def test_probabilities_are_averaged_after_the_temperature() -> None:
    attack = Averager(temperature=4.0, average="probabilities")
    z, y = draw(6, 3), torch.tensor([0, 2, 0, 2, 2, 1])
    torch.testing.assert_close(soften(attack.averaged(z, y), 4.0), mean_of_class(soften(z, 4.0), y))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_one_image_a_class_is_kd(average: Any) -> None:
    z, t, y = draw(4, 4), draw(4, 4, seed=1), torch.tensor([2, 0, 3, 1])
    attack = Averager(temperature=4.0, average=average)
    torch.testing.assert_close(kd(z, attack.averaged(t, y), y, 4.0, 0.9), kd(z, t, y, 4.0, 0.9))


def test_a_class_that_nobody_reveals_stays_withheld() -> None:
    never = -torch.inf
    log_p = torch.tensor([[0.0, -2.0, never, never], [-2.0, never, 0.0, never]]).double().log_softmax(dim=1)
    y = torch.tensor([1, 1])
    lowest = float(torch.tensor(1e-7).double().log())
    mean = Averager().averaged(log_p, y)
    torch.testing.assert_close(
        mean[0, :3], torch.stack([log_p[:, 0].mean(), (log_p[0, 1] + lowest) / 2, (log_p[1, 2] + lowest) / 2])
    )
    assert (mean[:, 3] == never).all()
    softened = soften(Averager(temperature=4.0, average="probabilities").averaged(log_p, y), 4.0)
    torch.testing.assert_close(softened, mean_of_class(soften(log_p, 4.0), y))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_averages_of_stingy_answers_are_answers(average: Any, data: Split, victim: nn.Module) -> None:
    answers = Stingy(ratio=0.5).serve(victim, context(data))(data.x)
    y = torch.arange(len(data)) % 2  # groups that have nothing to do with what is revealed
    p = soften(Averager(average=average).averaged(answers, y), 20.0)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(len(data)))
    assert p.isfinite().all()


def test_wrong_answers_about_single_images_are_averaged_out(data: Split, victim: nn.Module) -> None:
    wrong = inconsistent(victim)(data.x).argmax(dim=1) != data.y
    assert 0.2 < float(wrong.float().mean()) < 0.6
    oracle = answering(inconsistent(victim), victim)
    blind, average = (
        attacker.steal(oracle, context(data, epochs=20))
        for attacker in (KD(alpha=1.0), Averager(temperature=4.0, alpha=1.0))
    )
    assert accuracy(blind, blobs().validation) < 0.8
    assert accuracy(average, blobs().validation) > 0.9
