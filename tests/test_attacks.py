"""The built-in attacks and baselines: the papers' formulas as numbers, who asks what and how often, and the inversion."""

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
from kdbench.api import (
    Access,
    Attack,
    Context,
    DataSubset,
    KdbenchError,
    Oracle,
    QueryFunction,
    Refused,
    Scenario,
    Service,
    Split,
    fit,
    jensen_shannon,
    kl,
    predict_logits,
    soften,
)
from kdbench.attacks import assistant_kd
from kdbench.attacks._features import Features, Normed
from kdbench.attacks.assistant_kd import AssistantKD
from kdbench.attacks.cross_entropy import CrossEntropy
from kdbench.attacks.deep_inversion import DeepInversion, Objective, total_variation
from kdbench.attacks.hard_label import HardLabel
from kdbench.attacks.kd import KD, distil, kd_loss
from kdbench.attacks.label_smoothing import LabelSmoothing
from kdbench.attacks.partial_kd import PartialKD
from kdbench.engine.stage_log import StageLog, Stopped
from kdbench.game.methods import Log
from kdbench.zoo.datasets import Blobs

S = torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64)
T = torch.tensor([[3.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
Y = torch.tensor([0])
EPOCHS, IMAGES = 2, 96
SMALL = DeepInversion(images=60, batch=24, iterations=8, lr=0.2, jitter=1, queries="once")
ADAPTIVE = replace(SMALL, competition=10.0, steps=3)
ATTACKS = [
    HardLabel(), HardLabel("once"), KD(), KD(queries="once"), PartialKD(fraction=0.5), AssistantKD(),
    AssistantKD(queries="once"), SMALL, replace(SMALL, queries="augmented"), ADAPTIVE, replace(ADAPTIVE, queries="augmented"),
]  # fmt: skip
BASELINES = [CrossEntropy(), LabelSmoothing()]
INTERRUPTIONS = [  # at each of the checkpoints that there are: one a batch of images, a lesson, an epoch of the student
    *((SMALL, after) for after in range(1, 6)),
    *((ADAPTIVE, after) for after in range(1, 8)),
    *((replace(ADAPTIVE, queries="augmented"), after) for after in range(1, 8)),
]


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


def oracle_on(model: nn.Module, access: Access = Access.WEIGHTS, budget: int | None = None) -> Oracle:
    return Oracle(truthful(model), Scenario(access=access, budget=budget), model)


def owner(attack: Attack, data: Split, seed: int = 0) -> Context:
    """The thief's side, with the part of `data` that `attack` uses."""
    return context(attack.data_subset().of(data), EPOCHS, seed)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def accuracy(model: nn.Module, split: Split) -> float:
    return float((predict_logits(model, split.x).argmax(dim=1) == split.y).float().mean())


def name(attack: Attack) -> str:
    kind = "Adaptive" if getattr(attack, "competition", 0) else ""
    return f"{kind}{type(attack).__name__}-{getattr(attack, 'queries', '')}"


# Formulas


def test_the_kd_loss_is_that_of_the_papers() -> None:
    loss = kd_loss(4.0, 0.9, labelled=True)
    assert float(loss(S, (T, Y))) == pytest.approx(0.998680543, abs=1e-8)
    assert float(kd_loss(4.0, 0.9, labelled=False)(S, (T, Y))) == pytest.approx(0.943513726, abs=1e-8)


def test_the_kd_term_is_summed_over_classes_and_not_averaged() -> None:
    weighted = 0.9 * float(kd_loss(4.0, 1.0, labelled=True)(S, (T, Y)))
    assert weighted == pytest.approx(0.849162353, abs=1e-8)
    assert weighted / 4 == pytest.approx(0.212290588, abs=1e-8)  # what reduction="mean" would make of it


def test_answers_as_log_probabilities_give_the_loss_of_the_logits() -> None:
    loss = kd_loss(4.0, 0.9, labelled=True)
    assert float(loss(S, (T.log_softmax(dim=1), Y))) == pytest.approx(float(loss(S, (T, Y))), abs=1e-12)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn() -> None:
    z = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = kd_loss(4.0, 1.0, labelled=True)(z, (z.detach(), torch.zeros(5, dtype=torch.long)))
    (gradient,) = torch.autograd.grad(value, z)
    assert abs(float(value.detach())) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


def test_the_gradient_of_the_kd_loss_is_alpha_T_times_the_difference_of_softened_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    z.requires_grad_()
    y = torch.arange(6) % 4
    (gradient,) = torch.autograd.grad(kd_loss(4.0, 0.9, labelled=True)(z, (t, y)), z)
    hard = z.softmax(dim=1) - F.one_hot(y, 4)
    expected = (0.9 * 4.0 * (soften(z, 4.0) - soften(t, 4.0)) + (1 - 0.9) * hard) / 6
    torch.testing.assert_close(gradient, expected)


def test_the_rivalry_is_the_true_jensen_shannon_divergence() -> None:
    assert float(jensen_shannon(soften(T, 3.0), soften(S, 3.0))) == pytest.approx(0.025807955, abs=1e-8)


def test_the_rivalry_is_not_the_reversed_divergence_of_the_official_code() -> None:
    p, q = soften(T, 3.0), soften(S, 3.0)
    middle = (p + q) / 2
    reverse = float(kl(middle, p.log()) + kl(middle, q.log())) / 2
    assert reverse == pytest.approx(0.026398930, abs=1e-8)
    assert float(jensen_shannon(p, q)) != pytest.approx(reverse, abs=1e-4)


def test_answers_are_softened_by_dividing_logits() -> None:
    assert soften(T, 4.0)[0].tolist() == pytest.approx([0.422761, 0.256418, 0.199698, 0.121123], abs=1e-6)
    assert soften(S, 4.0)[0].tolist() == pytest.approx([0.265037, 0.340315, 0.233895, 0.160753], abs=1e-6)


def test_the_student_of_an_inversion_learns_by_the_kl_alone() -> None:
    divergence = float((soften(T, 3.0) * (soften(T, 3.0) / soften(S, 3.0)).log()).sum())
    assert float(DeepInversion().loss(S, T)) == pytest.approx(9 * divergence, abs=1e-12)


def test_label_smoothing_is_cross_entropy_with_a_share_for_all_classes() -> None:
    log_p = S.log_softmax(dim=1)
    expected = 0.9 * 1.495181898 - 0.1 * float(log_p.mean())
    assert float(LabelSmoothing().loss(S, Y)) == pytest.approx(expected, abs=1e-8)


def test_total_variation_sums_the_norms_of_four_directions() -> None:
    u = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    assert float(total_variation(u)) == pytest.approx(13**0.5 + 5**0.5 + 4 + 1)


# Baselines


@pytest.mark.parametrize("baseline", BASELINES, ids=name)
def test_a_baseline_never_asks(baseline: Attack, data: Split, victim: nn.Module) -> None:
    asked: list[Tensor] = []
    oracle = Oracle(lambda x: asked.append(x) or predict_logits(victim, x), Scenario(access=Access.PROBS), victim)  # type: ignore[func-returns-value]
    baseline.steal(oracle, owner(baseline, data))
    assert not asked
    assert oracle.answered == 0
    assert baseline.needs is Access.NOTHING


@pytest.mark.parametrize("baseline", BASELINES, ids=name)
def test_a_baseline_without_labels_says_so(baseline: Attack, data: Split, victim: nn.Module) -> None:
    with pytest.raises(KdbenchError, match="no labels to train on"):
        baseline.steal(oracle_on(victim), owner(baseline, data.without_labels()))


@pytest.mark.parametrize("baseline", BASELINES, ids=name)
def test_a_baseline_without_images_says_so(baseline: Attack, data: Split, victim: nn.Module) -> None:
    with pytest.raises(KdbenchError, match="no images to train on"):
        baseline.steal(oracle_on(victim), context(DataSubset(fraction=0.0).of(data)))


def test_no_smoothing_is_cross_entropy(data: Split, victim: nn.Module) -> None:
    plain, smooth, none = (
        attack.steal(oracle_on(victim), owner(attack, data))
        for attack in (CrossEntropy(), LabelSmoothing(), LabelSmoothing(smoothing=0.0))
    )
    assert equal(plain, none)
    assert not equal(plain, smooth)


# Who asks what, and how often


@pytest.mark.parametrize("attack", [KD(), HardLabel(), PartialKD(fraction=1.0), AssistantKD()], ids=name)
def test_asking_about_augmentations_costs_every_image_in_every_epoch(
    attack: Attack, data: Split, victim: nn.Module
) -> None:
    oracle = oracle_on(victim)
    attack.steal(oracle, owner(attack, data))
    assert oracle.answered == EPOCHS * IMAGES


@pytest.mark.parametrize("attack", [KD(queries="once"), HardLabel("once"), AssistantKD(queries="once")], ids=name)
def test_asking_once_costs_every_image_once(attack: Attack, data: Split, victim: nn.Module) -> None:
    oracle = oracle_on(victim)
    attack.steal(oracle, owner(attack, data))
    assert oracle.answered == IMAGES


def test_a_last_batch_of_one_image_is_not_asked_about(victim: nn.Module) -> None:
    oracle = oracle_on(victim)
    KD().steal(oracle, context(Blobs(images=IMAGES + 1).load(Path()).train, EPOCHS))
    assert oracle.answered == EPOCHS * IMAGES


@pytest.mark.parametrize("attack", ATTACKS, ids=name)
def test_a_budget_that_is_one_answer_short_is_refused(attack: Attack, data: Split, victim: nn.Module) -> None:
    enough = oracle_on(victim)
    attack.steal(enough, owner(attack, data))
    exact = oracle_on(victim, budget=enough.answered)
    attack.steal(exact, owner(attack, data))
    assert exact.left == 0
    with pytest.raises(Refused, match="left"):
        attack.steal(oracle_on(victim, budget=enough.answered - 1), owner(attack, data))


@pytest.mark.parametrize("attack", [*ATTACKS, *BASELINES], ids=name)
def test_the_same_thief_steals_the_same_student(attack: Attack, data: Split, victim: nn.Module) -> None:
    one, two = (attack.steal(oracle_on(victim), owner(attack, data)) for _ in range(2))
    other = attack.steal(oracle_on(victim), owner(attack, data, seed=1))
    assert equal(one, two)
    assert not equal(one, other)


@pytest.mark.parametrize("attack", [*ATTACKS, *BASELINES], ids=name)
def test_every_thief_trains_the_student_that_was_made_first(attack: Attack, data: Split, victim: nn.Module) -> None:
    ctx, made = remembering(owner(attack, data))
    assert attack.steal(oracle_on(victim), ctx) is made[0]  # paired: all start from the same weights


@pytest.mark.parametrize("attack", [*ATTACKS, *BASELINES], ids=name)
def test_a_student_is_handed_over_in_eval_mode(attack: Attack, data: Split, victim: nn.Module) -> None:
    assert not attack.steal(oracle_on(victim), owner(attack, data)).training


# The hard label


def test_the_hard_label_thief_needs_nothing_but_labels(data: Split, victim: nn.Module) -> None:
    exact = HardLabel().steal(oracle_on(victim, Access.PROBS), owner(HardLabel(), data))
    assert equal(exact, HardLabel().steal(oracle_on(victim, Access.LABEL), owner(HardLabel(), data)))


def test_the_hard_label_thief_is_blind_to_soft_values(data: Split, victim: nn.Module) -> None:
    def softer(x: Tensor) -> Tensor:
        return (predict_logits(victim, x) / 7).log_softmax(dim=1)

    same, other = (Oracle(service, Scenario(), victim) for service in (truthful(victim), softer))
    assert equal(HardLabel().steal(same, context(data)), HardLabel().steal(other, context(data)))
    assert not equal(KD().steal(same, context(data)), KD().steal(other, context(data)))


def test_the_hard_label_thief_learns_the_victims_labels_and_not_the_true_ones(data: Split, victim: nn.Module) -> None:
    def shifted(x: Tensor) -> Tensor:
        return truthful(victim)(x).roll(1, dims=1)

    student = HardLabel().steal(Oracle(shifted, Scenario(), victim), context(data, epochs=10))
    assert accuracy(student, replace(data, y=(data.y + 1) % 3)) > 0.9
    unlabelled = HardLabel().steal(Oracle(shifted, Scenario(), victim), context(data.without_labels(), epochs=10))
    assert equal(student, unlabelled)


# Part of the data


def test_partial_kd_owns_a_balanced_part(data: Split) -> None:
    attack = PartialKD(fraction=0.25, subset_seed=3)
    assert attack.data_subset() == DataSubset(0.25, 3)
    part = attack.data_subset().of(data)
    assert part.y.bincount().tolist() == [8, 8, 8]
    assert not torch.equal(part.x, PartialKD(fraction=0.25, subset_seed=4).data_subset().of(data).x)


def test_partial_kd_asks_about_its_part_alone(data: Split, victim: nn.Module) -> None:
    attack = PartialKD(fraction=0.25, queries="once")
    oracle = oracle_on(victim)
    attack.steal(oracle, owner(attack, data))
    assert oracle.answered == IMAGES / 4


def test_partial_kd_with_all_data_is_kd(data: Split, victim: nn.Module) -> None:
    whole = PartialKD(fraction=1.0)
    assert equal(whole.steal(oracle_on(victim), owner(whole, data)), KD().steal(oracle_on(victim), context(data)))


@pytest.mark.parametrize("fraction", [0.0, 1.1])
def test_partial_kd_refuses_a_part_that_is_none(fraction: float) -> None:
    with pytest.raises(KdbenchError, match=r"PartialKD\.fraction must be"):
        PartialKD(fraction=fraction)


# Assistants


def test_an_empty_chain_is_kd(data: Split, victim: nn.Module) -> None:
    students = [a.steal(oracle_on(victim), context(data)) for a in (AssistantKD(chain=()), KD(), AssistantKD())]
    assert equal(students[0], students[1])
    assert not equal(students[0], students[2])


@pytest.mark.parametrize(("queries", "asked"), [("once", IMAGES), ("augmented", EPOCHS * IMAGES)])
def test_only_the_first_hop_asks_the_oracle(queries: Any, asked: int, data: Split, victim: nn.Module) -> None:
    oracle = oracle_on(victim)
    AssistantKD(chain=("mini-16", "", ""), queries=queries).steal(oracle, context(data, EPOCHS))
    assert oracle.answered == asked


def test_the_chain_names_its_networks(data: Split, victim: nn.Module) -> None:
    attack = AssistantKD(chain=("mini-16", "", "mini-32"))
    ctx, made = remembering(context(data))
    attack.steal(oracle_on(victim), ctx)
    assert attack.networks() == ("mini-16", "mini-32")
    assert [net.classifier.in_features for net in made] == [16, 32, 16, 64]  # the student first


def test_an_assistant_teaches_what_it_learnt_and_learns_no_more(
    data: Split, victim: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    hops: list[tuple[nn.Module, QueryFunction, nn.Module]] = []

    def watched(student: nn.Module, teacher: Any, *rest: Any) -> None:
        distil(student, teacher, *rest)
        hops.append((student, teacher, copy.deepcopy(student)))

    monkeypatch.setattr(assistant_kd, "distil", watched)
    oracle = oracle_on(victim)
    student = AssistantKD(chain=("mini-16", "")).steal(oracle, context(data))
    assert hops[0][1] is oracle
    for (elder, _, _), (_, teacher, _) in itertools.pairwise(hops):
        torch.testing.assert_close(teacher(data.x), predict_logits(elder, data.x), rtol=1e-4, atol=1e-4)
    assert hops[-1][0] is student
    for net, _, then in hops:
        assert not net.training
        assert equal(net, then)
        assert all(p.grad is None for p in net.parameters())  # training clears its own


# DeepInversion: the terms


def test_the_feature_distance_is_zero_where_a_batch_is_what_the_layers_remember(victim: nn.Module) -> None:
    net, x = copy.deepcopy(victim).double(), torch.rand(32, 1, 8, 8, dtype=torch.float64)
    for layer in norms(net):  # in order: in eval mode, what enters a layer depends on those before it alone
        entering = inputs(net, x)[layer]
        layer.running_mean = entering.mean(dim=(0, 2, 3))
        layer.running_var = entering.var(dim=(0, 2, 3), correction=0)
    with Features(net) as features:
        assert float(features(x)[1]) < 1e-10
        assert float(features(1 - x)[1]) > 0.1


def test_the_feature_distance_is_the_papers_sum(data: Split, victim: nn.Module) -> None:
    entering = inputs(victim, data.x)
    expected = 0.0
    for layer in norms(victim):
        var, mean = torch.var_mean(entering[layer], dim=(0, 2, 3), correction=0)
        expected += float((var - layer.running_var).norm() + (mean - layer.running_mean).norm())
    with Features(victim) as features:
        z, r_feat = features(data.x)
        again = features(data.x)[1]
    assert float(r_feat) == pytest.approx(expected, rel=1e-5)
    assert float(again) == float(r_feat)  # of one forward pass, not of all so far
    torch.testing.assert_close(z, predict_logits(victim, data.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 3), (4, 3, 2), (4, 3, 2, 5)])
def test_a_fused_norm_and_its_gradient_are_right(size: tuple[int, ...]) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(size, dtype=torch.float64, generator=draws, requires_grad=True)
    scale, shift = torch.rand(2, 3, dtype=torch.float64, generator=draws)
    y, mean, var = Normed.apply(x, scale, shift)
    dims = [d for d in range(len(size)) if d != 1]
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(var, x.var(dims, correction=0))
    wide = (1, 3, *[1] * (len(size) - 2))
    torch.testing.assert_close(y, x * scale.view(wide) + shift.view(wide))
    assert torch.autograd.gradcheck(lambda x: Normed.apply(x, scale, shift), x)


class Strange(nn.BatchNorm2d):
    """A batch norm that doubles what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(1, 4, 3), Strange(4), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)],
        [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(1, 4, 3), *[nn.BatchNorm2d(4)] * 2, nn.Flatten(), nn.Linear(144, 3)],
    ],
    ids=["no weights", "a subclass", "flat", "no memory", "the same twice"],
)
def test_features_change_no_answer_of_any_batch_norm(layers: list[nn.Module]) -> None:
    """Answers, the distance and the gradient of both, against hooks and autograd alone."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers).double()
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    net.eval().requires_grad_(False)
    x = torch.rand(16, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    gaps = [x.new_zeros(())]

    def look(layer: Any, entering: tuple[Tensor]) -> None:
        dims = [d for d in range(entering[0].ndim) if d != 1]
        var, mean = torch.var_mean(entering[0], dims, correction=0)
        gaps.append((var - layer.running_var).norm() + (mean - layer.running_mean).norm())

    watched = [layer for layer in Features(net).layers]
    handles = [layer.register_forward_pre_hook(look) for layer in watched]
    expected = net(x)
    for handle in handles:
        handle.remove()
    (slope,) = torch.autograd.grad(expected.sum() + sum(gaps), x)
    with Features(net) as features:
        z, r_feat = features(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(r_feat, torch.stack(gaps).sum())
    torch.testing.assert_close(torch.autograd.grad(z.sum() + r_feat, x)[0], slope)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    assert hooks(net) == 0


def test_an_inversion_in_bf16_makes_nearly_the_same_judgement(data: Split, victim: nn.Module) -> None:
    u, y = 4 * data.x - 2, data.y
    judged = []
    for precision in ("fp32", "bf16"):
        ctx = replace(context(data), precision=precision)
        with torch.no_grad(), Features(victim) as features:
            judged.append(Objective(SMALL, features, context(data).new_student().eval(), ctx)(u, y))
    assert judged[1].dtype == torch.float32
    torch.testing.assert_close(judged[1], judged[0], rtol=0.03, atol=0)
    assert not torch.equal(*judged)


def test_no_hook_is_left_after_an_error(victim: nn.Module) -> None:
    def fail() -> None:
        with Features(victim) as features:
            assert hooks(victim) == 3
            features(torch.zeros(2, 5, 8, 8))

    with pytest.raises(RuntimeError):
        fail()
    assert hooks(victim) == 0


def test_the_whole_objective_is_the_sum_of_its_terms(data: Split, victim: nn.Module) -> None:
    attack = DeepInversion(feature=3.0, tv=0.2, l2=0.1, competition=5.0)
    competing_student = context(data).new_student().eval()
    u, y = 4 * data.x - 2, data.y
    with torch.no_grad(), Features(victim) as features:
        loss, r_feat = Objective(attack, features, competing_student, context(data))(u, y)
        z, same = features(data.x)
    divergence = jensen_shannon(soften(z, 3.0), soften(predict_logits(competing_student, data.x), 3.0))
    expected = F.cross_entropy(z, y) + 0.2 * total_variation(u) + 0.1 * u.norm() + 3.0 * same + 5.0 * (1 - divergence)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(r_feat, same)


# DeepInversion: the images


def test_the_inversion_leaves_the_victim_as_it_was(data: Split, victim: nn.Module) -> None:
    class Remembering(Oracle):
        def model(self) -> nn.Module:
            handed.append(super().model())
            return handed[-1]

    handed: list[nn.Module] = []
    ADAPTIVE.steal(Remembering(truthful(victim), Scenario(access=Access.WEIGHTS), victim), owner(ADAPTIVE, data))
    assert len(handed) == 1
    assert equal(handed[0], victim)
    assert hooks(handed[0]) == 0
    assert all(p.grad is None and not p.requires_grad for p in handed[0].parameters())
    assert not handed[0].training


def test_the_best_images_are_kept_though_the_last_are_worse(
    data: Split, victim: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def worsening(judge: Objective, u: Tensor, y: Tensor) -> Tensor:
        seen.append(u.detach().clone())
        away = abs(len(seen) - 3)  # the third of the iterates is the best
        return torch.stack([1000.0 * away + u.sum(), torch.tensor(float(len(seen)))])

    monkeypatch.setattr(Objective, "__call__", worsening)
    attack = replace(SMALL, jitter=0)
    with Features(victim) as features:
        images, losses = attack._invert(0, Objective(attack, features, None, context(data)), owner(attack, data))
    assert len(seen) == attack.iterations
    torch.testing.assert_close(images, 0.5 + 0.25 * seen[2], rtol=0, atol=0)
    assert float(losses[1]) == 3
    assert not torch.equal(seen[2], seen[-1])


def test_the_loss_that_is_written_down_is_that_of_the_images_that_are_kept(data: Split, victim: nn.Module) -> None:
    attack = replace(SMALL, jitter=0, iterations=30, lr=1.0)
    with Features(victim) as features:
        judge = Objective(attack, features, None, context(data))
        images, losses = attack._invert(0, judge, owner(attack, data))
        torch.testing.assert_close(judge((images - 0.5) / 0.25, torch.arange(24) % 3), losses)


def test_an_inversion_lowers_what_it_minimises(data: Split, victim: nn.Module) -> None:
    def final(iterations: int) -> Tensor:
        attack = replace(SMALL, jitter=0, iterations=iterations)
        with Features(victim) as features:
            return attack._invert(0, Objective(attack, features, None, context(data)), owner(attack, data))[1]

    start, end = final(1), final(60)
    assert end[0] < 0.3 * start[0]
    assert end[1] < 0.3 * start[1]


def test_images_stay_in_the_unit_cube_however_long_the_steps(data: Split, victim: nn.Module) -> None:
    ctx, shown = showing(owner(SMALL, data))
    replace(SMALL, lr=50.0).steal(oracle_on(victim), ctx)
    assert shown["inverted"].amin() == 0
    assert shown["inverted"].amax() == 1


def test_competition_makes_images_on_which_victim_and_rival_differ(data: Split, victim: nn.Module) -> None:
    competing_student = KD().steal(oracle_on(victim), context(data, epochs=6))

    def divergence(competition: float) -> float:
        attack = replace(SMALL, iterations=40, competition=competition)
        with torch.enable_grad(), Features(victim) as features:
            x, _ = attack._invert(0, Objective(attack, features, competing_student, context(data)), owner(attack, data))
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
    ctx = owner(SMALL, data)
    SMALL.steal(oracle_on(plain), ctx)
    assert ctx.log.numbers["batch_norm_layers"] == 0
    assert ctx.log.numbers["feature_loss"] == 0
    assert ctx.log.numbers["inversion_loss"] > 0


def test_an_inversion_that_diverges_says_so(data: Split) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * torch.nan

    with pytest.raises(KdbenchError, match="the inversion diverged"):
        SMALL.steal(oracle_on(Broken()), owner(SMALL, data))


# DeepInversion: the theft


@pytest.mark.parametrize("attack", [SMALL, ADAPTIVE], ids=name)
def test_the_inversion_owns_no_image_and_needs_the_weights(
    attack: DeepInversion, data: Split, victim: nn.Module
) -> None:
    assert attack.needs is Access.WEIGHTS
    assert len(owner(attack, data).data) == 0
    with pytest.raises(Refused, match="asked for the weights"):
        attack.steal(oracle_on(victim, Access.PROBS), owner(attack, data))


def test_the_inversion_asks_once_about_each_image_or_about_each_augmented_batch(data: Split, victim: nn.Module) -> None:
    def asked(attack: DeepInversion) -> int:
        oracle = oracle_on(victim)
        attack.steal(oracle, owner(attack, data))
        return oracle.answered

    lessons = 2 * ADAPTIVE.steps * 32  # three batches of images, a lesson of recipe batches before each but the first
    assert asked(SMALL) == asked(ADAPTIVE) == SMALL.images
    assert asked(replace(SMALL, queries="augmented")) == EPOCHS * SMALL.images
    assert asked(replace(ADAPTIVE, queries="augmented")) == EPOCHS * SMALL.images + lessons


@pytest.mark.parametrize("attack", [SMALL, ADAPTIVE], ids=name)
def test_what_is_asked_once_is_asked_about_the_images_that_are_learnt(
    attack: DeepInversion, data: Split, victim: nn.Module
) -> None:
    asking = (attack, replace(attack, queries="augmented"))
    one, two = (a.steal(oracle_on(victim), owner(a, data)) for a in asking)
    for ours, theirs in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # the recipe augments nothing: the same answers


@pytest.mark.parametrize("competition", [0.0, 1.0])
def test_a_student_of_inverted_images_knows_the_real_ones(competition: float, data: Split, victim: nn.Module) -> None:
    attack = DeepInversion(
        images=192, batch=96, iterations=60, lr=0.2, jitter=0, competition=competition, steps=5, queries="once"
    )
    ctx = context(attack.data_subset().of(data), epochs=15)
    assert accuracy(attack.steal(oracle_on(victim), ctx), blobs().validation) > 0.6  # chance: 0.33


@pytest.mark.parametrize(("attack", "after"), INTERRUPTIONS)
def test_an_interrupted_inversion_goes_on_to_the_same_student(
    attack: DeepInversion, after: int, data: Split, victim: nn.Module, tmp_path: Path
) -> None:
    def play(stage_log: StageLog) -> tuple[nn.Module, int, dict[str, float]]:
        ctx = replace(owner(attack, data), log=stage_log)
        stage_log.generators.append(ctx.generator)
        oracle = Oracle(truthful(victim), Scenario(access=Access.WEIGHTS), victim, stage_log.query_counter)
        return attack.steal(oracle, ctx), oracle.answered, stage_log.numbers

    whole, asked, numbers = play(Interrupted(tmp_path / "whole", 0))
    with pytest.raises(Stopped):
        play(Interrupted(tmp_path / "parts", after))
    student, answered, resumed = play(Interrupted(tmp_path / "parts", 0))
    assert equal(student, whole)
    assert (answered, resumed) == (asked, numbers)
    assert {p.name for p in tmp_path.glob("parts/*.safetensors")} == {
        p.name for p in tmp_path.glob("whole/*.safetensors")
    }


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


class Showing(Log):
    """Keeps the pictures it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, Tensor] = {}

    def images(self, name: str, x: Tensor) -> None:
        self.shown[name] = x


def showing(ctx: Context) -> tuple[Context, dict[str, Tensor]]:
    log = Showing()
    return replace(ctx, log=log), log.shown


def remembering(ctx: Context) -> tuple[Context, list[Any]]:
    """The same context, and the networks it will have made."""
    made: list[Any] = []

    def new_student(name: str | None = None) -> nn.Module:
        network = ctx.new_student(name)
        made.append(network)
        return network

    return replace(ctx, new_student=new_student), made


def norms(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def hooks(model: nn.Module) -> int:
    return sum(len(layer._forward_pre_hooks) + ("forward" in vars(layer)) for layer in model.modules())


def inputs(model: nn.Module, x: Tensor) -> dict[nn.Module, Tensor]:
    """What enters each batch norm of `model` in eval mode."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda net, entering: seen.update({net: entering[0]})) for layer in norms(model)
    ]
    predict_logits(model, x)
    for handle in handles:
        handle.remove()
    return seen
