"""The defenses that act when they answer, and the two that train for it: formulas as numbers, laws, what they are for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import blobs, context
from kdbench.api import (
    UNKNOWN,
    Defense,
    KdbenchError,
    Oracle,
    Scenario,
    Split,
    fit,
    jensen_shannon,
    predict_logits,
    soften,
)
from kdbench.attacks.hard_label import HardLabel
from kdbench.attacks.kd import KD
from kdbench.defenses.adaptive_misinformation import AdaptiveMisinformation, outliers, wrong
from kdbench.defenses.cmim import CMIM, information
from kdbench.defenses.gaussian_noise import GaussianNoise, noise, renormalised
from kdbench.defenses.label_only import LabelOnly
from kdbench.defenses.reverse_sigmoid import ReverseSigmoid, log_odds
from kdbench.defenses.rounding import Rounding
from kdbench.defenses.top_k import TopK
from kdbench.testing import check_defense
from kdbench.zoo.datasets import Blobs

S = torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64)
T = torch.tensor([[3.0, 1.0, 0.0, -2.0]], dtype=torch.float64)

AT_ANSWERING = [
    LabelOnly(),
    TopK(2),
    Rounding(1),
    Rounding(3),
    ReverseSigmoid(),
    ReverseSigmoid(beta=0.008, gamma=0.2),
    ReverseSigmoid(beta=5.0, gamma=2.0),
    GaussianNoise(),
    GaussianNoise(2.0),
]
WITH_TRAINING = [CMIM(), AdaptiveMisinformation(), AdaptiveMisinformation(exposure=0.0, threshold=0.9)]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return plain(data, epochs=12, seed=1)


def plain(data: Split, epochs: int = 2, seed: int = 0) -> nn.Module:
    """A network trained on the labels alone."""
    ctx = context(data, epochs=epochs, seed=seed)
    net = ctx.new_student()
    fit(net, F.cross_entropy, data.x, data.y, ctx)
    return net.requires_grad_(False)


def near(value: Tensor, expected: object, digits: int = 9) -> None:
    """Equal up to the last of `digits` printed digits after the point."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.double().reshape(wanted.shape), wanted, rtol=0, atol=0.6 * 10**-digits)


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def accuracy(net: nn.Module, data: Split) -> float:
    return float((predict_logits(net, data.x).argmax(dim=1) == data.y).float().mean())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(classes: int, count: int = 64, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(5))


def served(defense: Defense, z: Tensor, seed: int = 0) -> Tensor:
    """The answers (N,K) of a model whose logits are `z`: an "image" is its logits."""
    only_classes_matter = Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), z.shape[1])
    return defense.serve(nn.Flatten(), context(only_classes_matter, seed=seed))(z[:, :, None, None])


# All of them


@pytest.mark.parametrize("defense", AT_ANSWERING + WITH_TRAINING, ids=repr)
def test_the_contract_is_kept(defense: Defense) -> None:
    check_defense(defense)


@pytest.mark.parametrize("defense", AT_ANSWERING, ids=repr)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_answers_are_distributions_whatever_the_logits(defense: Defense, classes: int) -> None:
    certain = torch.full((2, classes), -torch.inf)
    certain[:, -1] = 0.0
    certain[1, 0] = 0.0
    tied = torch.zeros(1, classes)
    answers = served(defense, torch.cat([rows(classes), rows(classes, scale=1e4), certain, tied]))
    assert not answers.isnan().any()
    assert answers.max() <= 1e-6
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(len(answers)))


@pytest.mark.parametrize("defense", AT_ANSWERING, ids=repr)
def test_an_answer_depends_on_its_image_alone(defense: Defense) -> None:
    z = rows(10)
    order = torch.randperm(len(z), generator=generator(1))
    together = served(defense, z)
    alone = torch.cat([served(defense, row[None]) for row in z])
    assert torch.equal(served(defense, z[order]), together[order])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)  # vectorised arithmetic rounds otherwise


@pytest.mark.parametrize("defense", AT_ANSWERING, ids=repr)
def test_a_defense_at_answering_deploys_the_victim_itself(defense: Defense, victim: nn.Module, data: Split) -> None:
    assert defense.harden(victim, context(data)) is victim


@pytest.mark.parametrize("defense", [LabelOnly(), TopK(1), TopK(2), TopK(50)], ids=repr)
def test_the_label_stays_where_that_is_promised(defense: Defense) -> None:
    ties = torch.randint(3, (200, 10), generator=generator(2)).float()
    for z in (rows(10, count=500), ties):
        assert torch.equal(served(defense, z).argmax(dim=1), z.argmax(dim=1))


@pytest.mark.parametrize("defense", [LabelOnly(), TopK(2)], ids=repr)
def test_the_hard_label_thief_gets_the_same_student_as_from_no_defense(
    defense: Defense, victim: nn.Module, data: Split
) -> None:
    met, unmet = (
        HardLabel().steal(Oracle(one.serve(victim, context(data)), Scenario(), victim), context(data))
        for one in (defense, Defense())
    )
    assert same(met, unmet)


# Label only, top-k


def test_label_only_answers_one_hot() -> None:
    z = rows(10)
    assert torch.equal(served(LabelOnly(), z).exp(), F.one_hot(z.argmax(dim=1), 10).float())


@pytest.mark.parametrize(("k", "revealed"), [(1, 1), (3, 3), (9, 9), (10, 10), (99, 10)])
def test_top_k_reveals_so_many_classes_ties_or_not(k: int, revealed: int) -> None:
    z = torch.cat([rows(10), torch.zeros(1, 10), rows(10).round()])
    shown = served(TopK(k), z).isfinite()
    assert (shown.sum(dim=1) == revealed).all()
    least = torch.where(shown, z, torch.inf).amin(dim=1)
    assert (torch.where(shown, -torch.inf, z).amax(dim=1) <= least).all()


def test_top_k_renormalises_what_it_reveals() -> None:
    near(soften(served(TopK(2), T), 1.0), [[0.880797, 0.119203, 0, 0]], digits=6)
    near(soften(served(TopK(2), T), 20.0), [[0.524979, 0.475021, 0, 0]], digits=6)
    torch.testing.assert_close(served(TopK(2), T + 7), served(TopK(2), T))


def test_top_k_of_all_is_no_defense_and_of_one_is_label_only() -> None:
    z = rows(10)
    torch.testing.assert_close(served(TopK(10), z), served(Defense(), z))
    assert torch.equal(served(TopK(1), z), served(LabelOnly(), z))


def test_top_k_needs_a_class() -> None:
    with pytest.raises(KdbenchError, match=r"k.*greater than or equal to 1"):
        TopK(0)


# Rounding


def test_rounding_rounds_and_renormalises() -> None:
    p = torch.tensor([[0.64, 0.27, 0.06, 0.03], [0.96, 0.02, 0.01, 0.01]])
    near(served(Rounding(1), p.log()).exp(), [[6 / 10, 3 / 10, 1 / 10, 0], [1, 0, 0, 0]], digits=6)
    near(served(Rounding(1), torch.tensor([[0.36, 0.36, 0.28]]).log()).exp(), [[4 / 11, 4 / 11, 3 / 11]], digits=6)


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_rounded_answers_are_whole_numbers_of_the_last_decimal(decimals: int) -> None:
    z = rows(10)
    p = served(Rounding(decimals), z).exp()
    step = 10.0**-decimals
    total = (z.softmax(dim=1) / step).round().sum(dim=1, keepdim=True)  # what the answers were divided by
    counts = p * total
    assert (counts - counts.round()).abs().max() < 1e-3
    assert (counts * step - z.softmax(dim=1)).abs().max() <= 0.5 * step + 1e-6


def test_a_row_that_rounds_to_nothing_is_answered_by_its_label() -> None:
    z = torch.zeros(2, 100)
    z[:, 7] = 0.1
    assert torch.equal(served(Rounding(1), z).exp(), F.one_hot(torch.tensor([7, 7]), 100).float())


def test_more_decimals_than_there_are_change_nothing() -> None:
    z = rows(10)
    for decimals in (7, 60):
        near(served(Rounding(decimals), z).exp(), z.softmax(dim=1).double(), digits=6)


# Reverse sigmoid


@pytest.mark.parametrize(
    ("beta", "gamma", "expected"),
    [
        (1.0, 0.1, [0.657125, 0.135688, 0.098390, 0.108798]),
        (0.5, 0.2, [0.662639, 0.136338, 0.097661, 0.103362]),
    ],
)
def test_reverse_sigmoid_gives_the_published_numbers(beta: float, gamma: float, expected: list[float]) -> None:
    near(served(ReverseSigmoid(beta, gamma), T).exp(), [expected], digits=6)


def test_reverse_sigmoid_takes_from_the_winner_and_keeps_it_unless_beta_is_large() -> None:
    z = rows(10, count=500)
    p, mild, harsh = (served(d, z).exp() for d in (Defense(), ReverseSigmoid(), ReverseSigmoid(beta=5.0, gamma=2.0)))
    sure = p.amax(dim=1) > 0.6
    assert (mild.amax(dim=1) < p.amax(dim=1))[sure].all()
    assert torch.equal(mild.argmax(dim=1)[sure], p.argmax(dim=1)[sure])
    assert not torch.equal(harsh.argmax(dim=1)[sure], p.argmax(dim=1)[sure])


def test_a_weak_reverse_sigmoid_is_nearly_no_defense() -> None:
    z = rows(10)
    torch.testing.assert_close(served(ReverseSigmoid(beta=1e-6), z).exp(), z.softmax(dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lead", [5.0, 20.0, 40.0, 80.0])
def test_the_odds_of_sure_answers_are_right_in_single_precision(lead: float) -> None:
    z = torch.tensor([[0.0, lead, 1.0, -lead]])
    exact = z.double()
    expected = exact - torch.stack([others.logsumexp(dim=1) for others in without_each(exact)], dim=1)
    torch.testing.assert_close(log_odds(z.log_softmax(dim=1)), expected.float(), rtol=1e-5, atol=1e-5)
    near(served(ReverseSigmoid(), z).exp(), served(ReverseSigmoid(), exact).exp(), digits=6)


def without_each(z: Tensor) -> list[Tensor]:
    return [torch.cat([z[:, :k], z[:, k + 1 :]], dim=1) for k in range(z.shape[1])]


# Gaussian noise


def test_noise_is_standard_normal_and_independent_across_images_and_classes() -> None:
    x = torch.rand(20_000, 1, 2, 2, generator=generator(3))
    drawn = noise(x, 4, secret=11)
    assert drawn.isfinite().all()
    assert drawn.mean(dim=0).abs().max() < 0.03  # four deviations of a mean of 20,000
    assert (drawn.std(dim=0) - 1).abs().max() < 0.03
    assert (drawn.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.004)
    classes_and_neighbours = torch.cat([drawn[1:], drawn[:-1]], dim=1).T
    assert (torch.corrcoef(classes_and_neighbours) - torch.eye(8)).abs().max() < 0.035


def test_noise_hangs_on_every_bit_of_the_image_and_on_the_secret() -> None:
    x = torch.rand(1, 1, 3, 3, generator=generator(4)).repeat(11, 1, 1, 1)
    for pixel in range(9):
        x[pixel].view(-1)[pixel] = torch.nextafter(x[pixel].view(-1)[pixel], torch.tensor(2.0))
    drawn = noise(x, 3, secret=11)
    assert torch.equal(drawn[9], drawn[10])
    assert len({tuple(row) for row in drawn.tolist()}) == 10
    assert not torch.isclose(noise(x, 3, secret=12), drawn).any()


def test_noise_does_not_tell_how_an_image_lies_in_memory_or_signs_its_zeros() -> None:
    x = torch.rand(8, 3, 4, 4, generator=generator(4)).round(decimals=1)
    drawn = noise(x, 5, secret=1)
    assert torch.equal(noise(x.to(memory_format=torch.channels_last), 5, secret=1), drawn)
    assert torch.equal(noise(torch.where(x == 0, -x, x), 5, secret=1), drawn)


@pytest.mark.parametrize("sigma", [0.001, 0.005])
def test_answers_scatter_by_sigma(sigma: float) -> None:
    z = rows(8, count=4000, scale=0.01)
    error = served(GaussianNoise(sigma), z).exp() - z.softmax(dim=1)
    expected = sigma * (7 / 8) ** 0.5  # renormalising takes the mean of the noise away
    assert error.std().item() == pytest.approx(expected, rel=0.04)


def test_asking_again_averages_no_noise_out_and_each_service_has_its_own() -> None:
    z = rows(10)
    again = torch.stack([served(GaussianNoise(), z) for _ in range(3)])
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], again[2])
    assert not torch.equal(served(GaussianNoise(), z, seed=1), again[0])


def test_no_noise_is_no_defense() -> None:
    torch.testing.assert_close(served(GaussianNoise(0.0), rows(10)), served(Defense(), rows(10)))


def test_what_noise_leaves_nothing_of_is_answered_uniformly() -> None:
    p = torch.tensor([[-0.5, -0.1, -0.2, -0.7], [0.5, -1.0, 1.5, 0.0]])
    near(renormalised(p).exp(), [[0.25, 0.25, 0.25, 0.25], [0.25, 0.0, 0.75, 0.0]], digits=6)


# CMIM


def test_a_class_with_one_answer_carries_no_information() -> None:
    y = torch.tensor([0, 0, 0, 1, 1])
    z = rows(4, count=2).double()[y]
    near(information(z, y), 0.0, digits=12)
    near(information(z + torch.arange(5.0)[:, None], y), 0.0, digits=12)
    assert information(rows(4, count=5), y) > 0.1


def test_the_information_of_a_pair_is_twice_their_jensen_shannon_divergence() -> None:
    pair = torch.cat([S, T])
    expected = 2 * jensen_shannon(S.softmax(dim=1), T.softmax(dim=1))  # 2 / (2 - 1)
    near(information(pair, torch.tensor([3, 3])), expected, digits=12)
    # Another class, of one image, adds nothing to the sum over three.
    near(information(torch.cat([pair, rows(4, count=1)]), torch.tensor([3, 3, 0])), expected * 2 / 3, digits=6)


def test_small_batches_estimate_the_information_of_the_whole() -> None:
    z = 0.3 * torch.randn(3000, 4, dtype=torch.float64, generator=generator(6))
    whole = information(z, torch.zeros(3000, dtype=torch.int64))
    for size in (2, 3, 10):
        batches = [information(part, torch.zeros(size, dtype=torch.int64)) for part in z.split(size)]
        assert float(torch.stack(batches).mean()) == pytest.approx(float(whole), rel=0.05)


def test_cmim_adds_the_information_at_every_temperature_to_the_cross_entropy() -> None:
    z, y = rows(4).double(), torch.arange(64) % 4
    loss = CMIM(weight=0.5, temperatures=(1.0, 4.0)).loss(z, y)
    near(loss, F.cross_entropy(z, y) + 0.5 * (information(z, y) + information(z / 4, y)), digits=12)
    for bare in (CMIM(weight=0.0), CMIM(temperatures=())):
        near(bare.loss(z, y), F.cross_entropy(z, y), digits=12)


def test_cmim_has_finite_gradients_where_answers_are_one_hot() -> None:
    z = (1e4 * F.one_hot(torch.arange(12) % 3, 3).float()).requires_grad_()
    CMIM().loss(z, torch.arange(12) // 4).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_cmim_makes_a_class_answer_alike_and_keeps_the_labels() -> None:
    images = Blobs(images=300, noise=0.4).load(Path())
    data, test = images.train, images.test
    victim, hardened = plain(data, epochs=12), CMIM().harden(nn.Identity(), context(data, epochs=12))
    for temperature in (1.0, 4.0, 16.0):
        before, after = (information(predict_logits(net, test.x) / temperature, test.y) for net in (victim, hardened))
        assert after < 0.75 * before
    assert accuracy(hardened, test) >= accuracy(victim, test) - 0.02


def test_cmim_tells_how_much_information_is_left(victim: nn.Module, data: Split) -> None:
    ctx = context(data)
    hardened = CMIM().harden(victim, ctx)
    near(torch.tensor(ctx.log.numbers["information"]), information(predict_logits(hardened, data.x), data.y), digits=6)


def test_cmim_without_weight_is_plain_training(victim: nn.Module, data: Split) -> None:
    hardened = CMIM(weight=0.0).harden(victim, context(data))
    assert same(hardened, plain(data))
    assert not same(CMIM().harden(victim, context(data)), hardened)


# Adaptive misinformation


@pytest.mark.parametrize(("top", "expected"), [(0.8, 1.0), (0.9, 0.5), (0.901, 0.268941)])
def test_the_share_of_lies_is_the_published_one(top: float, expected: float) -> None:
    p = torch.tensor([[top, 1 - top]], dtype=torch.float64)
    lie = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    defense = AdaptiveMisinformation(threshold=0.9, nu=1000.0)
    near(defense.mixed(p.log(), lie.log()).exp()[:, 0] / top, [1 - expected], digits=6)


def test_mixtures_of_truth_and_lies_are_distributions() -> None:
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    log_p, log_lie = torch.cat([rows(3, 64).log_softmax(1), certain]), torch.cat([certain, rows(3, 64).log_softmax(1)])
    for defense in (AdaptiveMisinformation(), AdaptiveMisinformation(nu=5.0), AdaptiveMisinformation(threshold=1.0)):
        mixed = defense.mixed(log_p, log_lie)
        assert not mixed.isnan().any()
        torch.testing.assert_close(mixed.exp().sum(dim=1), torch.ones(65))


def test_the_liar_learns_from_the_reversed_cross_entropy() -> None:
    y = torch.tensor([0])
    near(wrong(S, y), -(1 - S.softmax(dim=1)[0, 0]).log(), digits=12)
    sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    wrong(sure, y).backward()  # the code's 1 - softmax has no digits left here
    assert sure.grad is not None
    near(sure.grad, [[1.0, -0.5, -0.5]], digits=5)


def test_exposure_asks_for_uniform_answers_to_outliers() -> None:
    z, y = torch.cat([S, T, T, S]), torch.tensor([0, UNKNOWN, 1, UNKNOWN])
    uniform = torch.full((2, 4), 0.25, dtype=torch.float64)
    expected = F.cross_entropy(z[[0, 2]], y[[0, 2]]) + 0.3 * F.cross_entropy(z[[1, 3]], uniform)
    near(AdaptiveMisinformation(exposure=0.3).loss(z, y), expected, digits=12)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (28, 28)])
def test_outliers_are_the_images_with_their_bands_in_disorder(size: tuple[int, int], data: Split) -> None:
    x = torch.rand(300, 2, *size, generator=generator(8))
    owner = context(replace(data, x=x, y=torch.zeros(300, dtype=torch.int64)))
    strange = outliers(owner)
    for channel in (0, 1):
        assert torch.equal(strange[:, channel].flatten(1).sort().values, x[:, channel].flatten(1).sort().values)
    assert (strange != x).flatten(1).any(dim=1).float().mean() > 0.97
    assert len({tuple(row) for row in (strange - x).sign().flatten(1).tolist()}) > 100


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10)])
def test_a_band_of_an_outlier_stays_whole(height: int, width: int, data: Split) -> None:
    numbered = torch.arange(height * width).reshape(1, 1, height, width).expand(50, -1, -1, -1)
    owner = context(replace(data, x=numbered.float(), y=torch.zeros(50, dtype=torch.int64)))
    strange = outliers(owner)[:, 0].long()
    row, column = strange // width, strange % width
    assert (row == row[:, :, :1]).all()
    assert (column == column[:, :1, :]).all()
    for order in (row[:, :, 0], column[:, 0, :]):
        assert (order.diff(dim=1) != 1).sum(dim=1).max() == 3  # four bands have three seams


def test_outliers_are_drawn_from_the_context(data: Split) -> None:
    assert torch.equal(outliers(context(data)), outliers(context(data)))
    assert not torch.equal(outliers(context(data, seed=1)), outliers(context(data)))


def test_adaptive_misinformation_without_exposure_deploys_the_victim(victim: nn.Module, data: Split) -> None:
    assert AdaptiveMisinformation(exposure=0.0).harden(victim, context(data)) is victim


UNSURE = AdaptiveMisinformation(threshold=0.7)  # of three classes, even a guess has a third
EPOCHS = 30


@pytest.fixture(scope="module")
def exposed(victim: nn.Module, data: Split) -> nn.Module:
    return UNSURE.harden(victim, context(data, epochs=EPOCHS)).requires_grad_(False)


def confidence(net: nn.Module, x: Tensor) -> Tensor:
    return predict_logits(net, x).softmax(dim=1).amax(dim=1)


def test_exposure_makes_a_victim_doubt_outliers_and_keeps_the_labels(exposed: nn.Module, victim: nn.Module) -> None:
    test = blobs().test
    strange = outliers(context(test, seed=3))
    assert confidence(exposed, strange).mean() < confidence(victim, strange).mean() - 0.15
    assert confidence(exposed, test.x).mean() > 0.9
    assert accuracy(exposed, test) >= accuracy(victim, test) - 0.02


def test_the_public_is_told_the_truth_and_lies_go_to_strangers(exposed: nn.Module, data: Split) -> None:
    test = blobs().test
    strange = outliers(context(test, seed=3))
    service = UNSURE.serve(exposed, context(data, epochs=EPOCHS))
    assert (service(test.x).argmax(dim=1) == test.y).float().mean() > 0.95
    sure = confidence(exposed, strange) > 0.75
    assert 0 < sure.sum() < 0.5 * len(strange)
    truth = predict_logits(exposed, strange).log_softmax(dim=1)
    torch.testing.assert_close(service(strange)[sure].exp(), truth[sure].exp(), rtol=0, atol=1e-4)
    assert (service(strange).argmax(dim=1) != truth.argmax(dim=1))[~sure].float().mean() > 0.7


def test_the_liar_is_wrong_about_the_public_too(exposed: nn.Module, data: Split) -> None:
    test = blobs().test
    service = replace(UNSURE, threshold=1.0).serve(exposed, context(data, epochs=EPOCHS))
    assert (service(test.x).argmax(dim=1) == test.y).float().mean() < 0.05


def test_a_thief_with_foreign_images_steals_less_under_misinformation(exposed: nn.Module, data: Split) -> None:
    foreign = replace(data, x=outliers(context(data, seed=4))).without_labels()

    def stolen(defense: Defense) -> float:
        oracle = Oracle(defense.serve(exposed, context(data, epochs=EPOCHS)), Scenario(), exposed)
        return accuracy(KD(alpha=1.0).steal(oracle, context(foreign, epochs=EPOCHS, seed=5)), blobs().test)

    assert stolen(UNSURE) < stolen(Defense()) - 0.2


def test_an_owner_reads_whom_the_lies_are_told(victim: nn.Module, data: Split) -> None:
    ctx = context(data, epochs=EPOCHS)
    UNSURE.harden(victim, ctx)
    assert ctx.log.numbers["misled"] < 0.1
    assert ctx.log.numbers["caught"] > 0.5


def test_a_service_trains_its_liar_on_what_the_context_gives_alone(exposed: nn.Module, data: Split) -> None:
    strange = outliers(context(data, seed=3))
    first, again, other = (UNSURE.serve(exposed, context(data, seed=seed))(strange) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
