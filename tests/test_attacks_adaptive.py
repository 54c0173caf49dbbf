"""Thieves made to undo defenses: the papers' formulas as numbers, who asks what and how often, and that they undo some."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import blobs, context
from kdbench import registry
from kdbench.api import (
    UNKNOWN,
    Access,
    Attack,
    Context,
    Diverged,
    KdbenchError,
    Oracle,
    QueryFunction,
    Refused,
    Scenario,
    Service,
    Split,
    fit,
    kd,
    kl,
    predict_logits,
    soften,
)
from kdbench.attacks.averager import Averager, classes_of, mean_of_class
from kdbench.attacks.htc import HTC
from kdbench.attacks.kd import KD
from kdbench.attacks.kd_grid import KDGrid, hold_out
from kdbench.attacks.scm import SCM
from kdbench.attacks.skeptical import Skeptic, Skeptical, Stage, classifier, stages
from kdbench.defenses.stingy import Stingy
from kdbench.engine.stage_log import StageLog, Stopped
from kdbench.testing import check_attack
from kdbench.training.fused import FusedTraining
from kdbench.zoo.layers import Network

S = torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64)
T = torch.tensor([[3.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
Y = torch.tensor([0])
EPOCHS, IMAGES = 2, 96
HELD = 9  # a tenth of 32 images of each of three classes
GRID = KDGrid(temperatures=(4.0, 1.0), alphas=(0.9, 0.1))
ONCE: list[Attack] = [
    HTC(queries="once"), SCM(models=("", ""), queries="once"), Skeptical(queries="once"), Averager(queries="once"),
    Averager(average="probabilities", queries="once"), replace(GRID, queries="once"),
]  # fmt: skip
ALL = [*ONCE, HTC(), SCM(models=("", "")), Skeptical(), Averager(), GRID]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    ctx = context(data, epochs=12, seed=1, model="mini-16")
    net = ctx.new_student()
    fit(net, F.cross_entropy, data.x, data.y, ctx)
    return net.requires_grad_(False)


def truthful(model: nn.Module) -> Service:
    return lambda x: predict_logits(model, x).log_softmax(dim=1)


def shifted(model: nn.Module) -> Service:
    """Lies about every image, always in the same way."""
    return lambda x: truthful(model)(x).roll(1, dims=1)


def fickle(model: nn.Module) -> Service:
    """Lies about two images of five, in ways that depend on the image."""

    def answer(x: Tensor) -> Tensor:
        log_p = truthful(model)(x)
        turn = (x.flatten(1).sum(dim=1) * 1e4).long() % 5
        lies = torch.stack([log_p.roll(shift, dims=1) for shift in (0, 0, 0, 1, 2)])
        return lies[turn, torch.arange(len(x))]

    return answer


def oracle_on(model: nn.Module, budget: int | None = None, access: Access = Access.TOPK, topk: int = 5) -> Oracle:
    return Oracle(truthful(model), Scenario(access=access, topk=topk, budget=budget), model)


def lying(service: Service, model: nn.Module) -> Oracle:
    return Oracle(service, Scenario(), model)


def asked(attack: Attack, data: Split, victim: nn.Module) -> int:
    oracle = oracle_on(victim)
    attack.steal(oracle, context(data, EPOCHS))
    return oracle.answered


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def accuracy(model: nn.Module, split: Split) -> float:
    return float((predict_logits(model, split.x).argmax(dim=1) == split.y).float().mean())


def name(attack: Attack) -> str:
    return f"{type(attack).__name__}-{getattr(attack, 'average', '')}-{getattr(attack, 'queries', '')}"


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Laws of all


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_it_keeps_the_contract(attack: Attack) -> None:
    check_attack(attack)


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_it_says_that_it_is_adaptive_and_makes_do_with_truncated_answers(attack: Attack) -> None:
    assert attack.adaptive
    assert attack.needs is Access.TOPK


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("attack", ALL, ids=name)
def test_withheld_classes_and_unknown_labels_leave_it_a_student_that_answers(
    attack: Attack, labelled: bool, topk: int, data: Split, victim: nn.Module
) -> None:
    subset = data if labelled else data.without_labels()
    student = attack.steal(oracle_on(victim, topk=topk), context(subset, EPOCHS))
    assert predict_logits(student, data.x).isfinite().all()


@pytest.mark.parametrize("attack", ONCE, ids=name)
def test_asking_once_costs_every_image_once_with_labels_and_without(
    attack: Attack, data: Split, victim: nn.Module
) -> None:
    assert asked(attack, data, victim) == IMAGES
    assert asked(attack, data.without_labels(), victim) == IMAGES


@pytest.mark.parametrize("attack", [HTC(), SCM(), Skeptical(), Averager()], ids=name)
def test_asking_about_augmentations_costs_every_image_in_every_epoch_of_one_training(
    attack: Attack, data: Split, victim: nn.Module
) -> None:
    assert asked(attack, data, victim) == EPOCHS * IMAGES  # of SCM's models, the first alone asks


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_a_budget_that_is_one_answer_short_is_refused(attack: Attack, data: Split, victim: nn.Module) -> None:
    enough = asked(attack, data, victim)
    exact = oracle_on(victim, enough)
    attack.steal(exact, context(data, EPOCHS))
    assert exact.left == 0
    with pytest.raises(Refused, match="left"):
        attack.steal(oracle_on(victim, enough - 1), context(data, EPOCHS))


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_it_hands_over_the_student_that_was_made_first_in_eval_mode_and_free_of_hooks(
    attack: Attack, data: Split, victim: nn.Module
) -> None:
    ctx, made = remembering(context(data, EPOCHS))
    student = attack.steal(oracle_on(victim), ctx)
    assert student is made[0]  # paired: all start from the same weights
    assert not any(layer.training or layer._forward_hooks for layer in student.modules())


@pytest.mark.parametrize(
    "attack",
    [
        HTC(),
        SCM(models=("",)),
        Skeptical(delay=0.5),
        KDGrid(temperatures=(4.0, 1.0), alphas=(0.1,)),
    ],
    ids=name,
)
def test_a_liar_who_fools_kd_does_not_fool_it(attack: Attack, data: Split, victim: nn.Module) -> None:
    oracle = lying(shifted(victim), victim)
    fooled, wary = (attacker.steal(oracle, context(data, epochs=20)) for attacker in (KD(), attack))
    assert accuracy(fooled, blobs().validation) < 0.1
    assert accuracy(wary, blobs().validation) > 0.9


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_of_an_honest_victim_it_learns(attack: Attack, data: Split, victim: nn.Module) -> None:
    for subset in (data, data.without_labels()):
        student = attack.steal(oracle_on(victim), context(subset, epochs=20))
        assert accuracy(student, blobs().validation) > 0.85


INTERRUPTIONS = [  # at each of the checkpoints that there are: one an epoch of each training
    *((Skeptical(delay=0.5), after) for after in (1, 2, 3)),
    *((SCM(models=("", "")), after) for after in range(1, 7)),
    *((KDGrid(temperatures=(4.0, 1.0), alphas=(0.9,), queries="once"), after) for after in range(1, 7)),
    (GRID, 4),
    (HTC(), 1),
    (Averager(), 1),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "after"), INTERRUPTIONS, ids=str)
def test_an_interrupted_theft_goes_on_to_the_same_student(
    attack: Attack, after: int, data: Split, victim: nn.Module, tmp_path: Path
) -> None:
    def play(stage_log: StageLog) -> tuple[nn.Module, int, dict[str, float]]:
        ctx = replace(context(data, epochs=4 if isinstance(attack, Skeptical) else EPOCHS), log=stage_log)
        stage_log.generators.append(ctx.generator)
        oracle = Oracle(truthful(victim), Scenario(), victim, stage_log.query_counter)
        return attack.steal(oracle, ctx), oracle.answered, stage_log.numbers

    whole, asked, numbers = play(Interrupted(tmp_path / "whole", 0))
    with pytest.raises(Stopped):
        play(Interrupted(tmp_path / "parts", after))
    student, answered, resumed = play(Interrupted(tmp_path / "parts", 0))
    assert equal(student, whole)
    assert (answered, resumed) == (asked, numbers)


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
    assert classes_of(torch.cat([T, S]), y).tolist() == [2, 1]


def test_the_ensemble_answers_the_mean_of_softened_probabilities() -> None:
    nets: list[QueryFunction] = [lambda x: S.expand(len(x), 4), lambda x: T.expand(len(x), 4)]
    x = torch.zeros(3, 1, 2, 2)
    mean = (soften(S, 4.0) + soften(T, 4.0)) / 2
    torch.testing.assert_close(soften(SCM(temperature=4.0).ensemble(nets)(x), 4.0), mean.expand(3, 4))
    torch.testing.assert_close(soften(SCM().ensemble(nets[:1])(x), 4.0), soften(S, 4.0).expand(3, 4))


def test_each_model_contradicts_its_predecessor_and_knows_the_labels(data: Split, victim: nn.Module) -> None:
    def contradictions(omega: float) -> list[float]:
        attack = SCM(models=("", ""), omega=omega)
        nets = [truthful(victim), *attack._sequence(oracle_on(victim), context(data, epochs=20))]
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


# Skeptical student


def test_the_skeptical_loss_is_the_sum_of_its_terms() -> None:
    h, t, y = draw(5, 3, 4), draw(5, 4, seed=1), torch.arange(5) % 4
    own, pupil, listener = h.unbind(dim=1)
    lesson = (soften(own, 4.0) * (soften(own, 4.0).log() - soften(pupil, 4.0).log())).sum(dim=1).mean()
    ce = [F.cross_entropy(z, y) for z in (own, pupil)]
    expected = kd(listener, t, y, 4.0, 0.9) + 0.3 * lesson + 0.7 * ce[1] + ce[0]
    torch.testing.assert_close(Skeptical().loss(h, t, y), expected)


def test_the_listening_head_may_be_the_one_that_is_taught() -> None:
    h, t, y = draw(5, 2, 4), draw(5, 4, seed=1), torch.arange(5) % 4
    torch.testing.assert_close(Skeptical().loss(h, t, y), Skeptical().loss(h[:, [0, 1, 1]], t, y))


def test_the_own_lesson_has_a_gradient_for_teacher_and_pupil() -> None:
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
    assert found[1] == Stage("features.4", 128)
    tiny = stages(registry.load("model", "resnet-18")((1, 8, 8), 10), torch.zeros(2, 1, 8, 8))
    assert [stage.channels for stage in tiny] == [64, 128, 256, 512]  # though the last maps are single pixels


def test_a_network_that_shrinks_nowhere_is_refused(data: Split, victim: nn.Module) -> None:
    def flat(name: str | None = None) -> nn.Module:
        return Network(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten()), nn.Linear(256, 3))

    with pytest.raises(KdbenchError, match="maps shrink on the way"):
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
    one, two = (deaf.steal(lying(s, victim), context(data)) for s in (truthful(victim), shifted(victim)))
    assert equal(one, two)
    listening = (
        replace(deaf, delay=0.0).steal(lying(s, victim), context(data)) for s in (truthful(victim), shifted(victim))
    )
    assert not equal(*listening)


def test_skeptical_students_in_company_learn_what_they_learn_alone(data: Split, victim: nn.Module) -> None:
    def stolen(fused: FusedTraining | None, seed: int, out: dict[int, nn.Module]) -> None:
        out[seed] = Skeptical(delay=0.5).steal(oracle_on(victim), replace(context(data, seed=seed), fused=fused))

    alone: dict[int, nn.Module] = {}
    together: dict[int, nn.Module] = {}
    for seed in (0, 1):
        stolen(None, seed, alone)
    fused = FusedTraining()
    fused.run([lambda s=seed: stolen(fused, s, together) for seed in (0, 1)])  # type: ignore[misc]
    assert all(equal(alone[seed], together[seed]) for seed in (0, 1))


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
    for T in (1.0, 20.0):
        mean = soften(mean_of_class(z, y), T)
        torch.testing.assert_close(soften(Averager().averaged(z.log_softmax(dim=1), y), T), mean)


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


def test_lies_about_single_images_are_washed_out(data: Split, victim: nn.Module) -> None:
    lies = fickle(victim)(data.x).argmax(dim=1) != data.y
    assert 0.2 < float(lies.float().mean()) < 0.6
    oracle = lying(fickle(victim), victim)
    blind, average = (
        attacker.steal(oracle, context(data, epochs=20))
        for attacker in (KD(alpha=1.0), Averager(temperature=4.0, alpha=1.0))
    )
    assert accuracy(blind, blobs().validation) < 0.8
    assert accuracy(average, blobs().validation) > 0.9


# The grid


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
    replace(GRID, held_out=0.3).steal(lying(shifted(victim), victim), ctx)
    numbers = ctx.log.numbers
    scores = {point: numbers["validation_T{:g}_alpha{:g}".format(*point)] for point in GRID.grid(labelled=True)}
    assert len(set(scores.values())) > 1
    assert (numbers["chosen_temperature"], numbers["chosen_alpha"]) == max(scores, key=lambda point: scores[point])
    assert numbers["chosen_alpha"] == 0.1  # of a liar, the less the better


def test_without_labels_the_winner_agrees_with_the_oracle(data: Split, victim: nn.Module) -> None:
    ctx = context(data.without_labels(), epochs=10)
    student = replace(GRID, queries="once").steal(lying(shifted(victim), victim), ctx)
    numbers = ctx.log.numbers
    assert max(numbers[f"validation_T{T}_alpha1"] for T in (1, 4)) > 0.9  # though every answer is a lie
    assert accuracy(student, replace(data, y=(data.y + 1) % 3)) > 0.9
    assert numbers["chosen_alpha"] == 1.0


def test_of_equals_the_earlier_wins(data: Split, victim: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def undecided(_: nn.Module, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)  # every candidate says the same of everything

    monkeypatch.setattr("kdbench.attacks.kd_grid.infer", undecided)
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
    assert all(torch.equal(x, candidates[0][1]) for _, x, _ in candidates)  # all are judged on the same
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
