"""The defenses that optimise their answers within a budget: against brute force and solvers, laws, what they are for."""

import itertools
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.testing import assert_close

from helpers import blobs, context
from kdbench import registry
from kdbench.api import Context, Defense, Log, Oracle, Scenario, Service, Split, fit, kl, predict_logits
from kdbench.attacks.hard_label import HardLabel
from kdbench.attacks.kd import KD
from kdbench.defenses.gradient_redirection import GradientRedirection, moved, rises
from kdbench.defenses.mad import MAD, TRIES, Turn, grown, tried
from kdbench.defenses.model_guard import MARGIN, ModelGuardS, ModelGuardW, least_telling
from kdbench.testing import check_defense

CLASSES = [2, 3, 10, 11, 100]
EPSILONS = [0.01, 0.3, 1.0, 1.9]
KEEPING: list[Defense] = [MAD(), ModelGuardW(), ModelGuardS()]
FREE: list[Defense] = [MAD(keep_argmax=False), GradientRedirection()]
ALL = [*KEEPING, *FREE]
IMAGE_ALONE = [defense for defense in ALL if not defense.stateful]


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    ctx = context(data, epochs=12, seed=1)
    net = ctx.new_student()
    fit(net, F.cross_entropy, data.x, data.y, ctx)
    return net.requires_grad_(False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(classes: int, count: int = 64, scale: float = 3.0, seed: int = 5) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(seed))


def logits(classes: int) -> Tensor:
    """Rows of all kinds: drawn, sure of themselves, certain, with ties, and with what float32 hardly tells apart."""
    certain = torch.full((2, classes), -torch.inf)
    certain[:, -1] = 0.0
    certain[1, 0] = 0.0
    ties = torch.randint(3, (64, classes), generator=generator(2)).float()
    hairline = torch.full((classes, classes), 1e-3)
    hairline.diagonal().copy_(torch.nextafter(hairline.diagonal(), torch.tensor(1.0)))
    drawn = [rows(classes), rows(classes, scale=0.01), rows(classes, scale=30.0), rows(classes, scale=1e4)]
    return torch.cat([*drawn, certain, ties, torch.zeros(1, classes), hairline])


def split_of(classes: int) -> Split:
    """A split of which only the number of classes matters."""
    return Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), classes)


def answers(defense: Any, z: Tensor, seed: int = 0) -> Tensor:
    """The answers (N,K) to images for which the victim has logits `z`, and the surrogate something made up."""
    made_up = rows(z.shape[1], len(z), scale=1.0, seed=seed).double()
    if isinstance(defense, MAD):
        return defense.perturbed(z, made_up.softmax(dim=1))
    if isinstance(defense, GradientRedirection):
        return defense.perturbed(z, made_up.float())
    service: Service = defense.serve(nn.Flatten(), context(split_of(z.shape[1])))  # an "image" is its logits
    return service(z[:, :, None, None])


def l1(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().sum(dim=1)


# All of them


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_the_contract_is_kept(defense: Defense) -> None:
    check_defense(defense)


@pytest.mark.parametrize("defense", ALL, ids=repr)
@pytest.mark.parametrize("classes", CLASSES)
def test_answers_are_distributions_whatever_the_logits(defense: Defense, classes: int) -> None:
    z = logits(classes)
    log_p = answers(defense, z)
    assert log_p.dtype == z.dtype
    assert not log_p.isnan().any()
    assert log_p.max() <= 0
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(len(z)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("defense", ALL, ids=repr)
@pytest.mark.parametrize("classes", [*CLASSES, 1000])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_budget_is_kept_to_the_last_bit(defense: Any, classes: int, epsilon: float) -> None:
    z = logits(classes) if classes < 1000 else torch.cat([rows(1000), rows(1000, scale=0.01)])
    log_p = answers(replace(defense, epsilon=epsilon), z)
    assert l1(log_p.double().exp(), z.double().softmax(dim=1)).max() <= epsilon
    assert l1(log_p.exp(), z.softmax(dim=1)).max() <= epsilon


@pytest.mark.parametrize("defense", KEEPING, ids=repr)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, *EPSILONS, 2.0])
def test_the_label_stays_where_that_is_promised(defense: Any, classes: int, epsilon: float) -> None:
    z = logits(classes)
    log_p = answers(replace(defense, epsilon=epsilon), z)
    assert torch.equal(log_p.argmax(dim=1), z.argmax(dim=1))
    assert ((log_p == log_p.amax(dim=1, keepdim=True)).sum(dim=1) == 1).all()  # and nobody can take it for a tie


@pytest.mark.parametrize("defense", FREE, ids=repr)
def test_the_label_goes_where_it_may(defense: Defense) -> None:
    z = rows(10)
    assert not torch.equal(answers(defense, z).argmax(dim=1), z.argmax(dim=1))


@pytest.mark.parametrize("defense", ALL, ids=repr)
@pytest.mark.parametrize("classes", CLASSES)
def test_without_a_budget_there_is_no_defense(defense: Any, classes: int) -> None:
    z = logits(classes)
    unmoved = answers(replace(defense, epsilon=0.0), z).exp()
    torch.testing.assert_close(unmoved, z.softmax(dim=1), rtol=1e-5, atol=1e-6)
    assert l1(answers(defense, rows(10)).exp(), rows(10).softmax(dim=1)).mean() > 0.05


@pytest.mark.parametrize("defense", IMAGE_ALONE, ids=repr)
@pytest.mark.parametrize("classes", [3, 10, 11])
def test_an_answer_depends_on_its_logits_alone(defense: Defense, classes: int) -> None:
    z = logits(classes)

    def asked(part: Tensor, made_up: Tensor) -> Tensor:
        if isinstance(defense, MAD):
            return defense.perturbed(part, made_up.softmax(dim=1))
        if isinstance(defense, GradientRedirection):
            return defense.perturbed(part, made_up)
        return answers(defense, part)

    # Ties on both sides: where nothing else decides, the order of the classes has to.
    made_up = torch.cat([rows(classes, len(z) - 40), torch.zeros(40, classes)]).double()
    together, order = asked(z, made_up), torch.randperm(len(z), generator=generator(1))
    assert torch.equal(asked(z[order], made_up[order]), together[order])
    alone = torch.cat([asked(z[n : n + 1], made_up[n : n + 1]) for n in range(len(z))])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("defense", IMAGE_ALONE, ids=repr)
def test_an_image_gets_its_answer_in_whatever_company(defense: Defense, victim: nn.Module, data: Split) -> None:
    service = defense.serve(victim, context(data))
    together, order = service(data.x), torch.randperm(len(data), generator=generator(1))
    assert l1(service(data.x[order]).exp(), together[order].exp()).max() < 1e-4
    alone = torch.cat([service(image[None]) for image in data.x])
    assert l1(alone.exp(), together.exp()).max() < 1e-4


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_they_deploy_the_victim_itself_and_leave_it_as_it_is(defense: Defense, victim: nn.Module, data: Split) -> None:
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    assert defense.harden(victim, context(data)) is victim
    defense.serve(victim, context(data))(data.x)
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_low_precision_is_the_networks_not_the_answers(defense: Any, victim: nn.Module, data: Split) -> None:
    ctx = replace(context(data), precision="bf16")
    log_p = defense.serve(victim, ctx)(data.x)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(len(data)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_nobody_asking_gets_no_answer(defense: Defense, victim: nn.Module, data: Split) -> None:
    assert defense.serve(victim, context(data))(data.x[:0]).shape == (0, 3)


@pytest.mark.parametrize("defense", KEEPING, ids=repr)
def test_the_hard_label_thief_gets_the_same_student_as_from_no_defense(
    defense: Defense, victim: nn.Module, data: Split
) -> None:
    met, unmet = (
        HardLabel().steal(Oracle(one.serve(victim, context(data)), Scenario(), victim), context(data))
        for one in (defense, Defense())
    )
    theirs = unmet.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in met.state_dict().items())


def stolen(defense: Defense, victim: nn.Module, data: Split, seed: int = 6) -> float:
    """How far (KL, on test images) a thief that learns nothing but the answers is from the victim."""
    oracle = Oracle(defense.serve(victim, context(data, epochs=12)), Scenario(), victim)
    attacker = KD(temperature=1.0, alpha=1.0).steal(oracle, context(data.without_labels(), epochs=12, seed=seed))
    x = blobs().test.x
    return float(kl(predict_logits(victim, x).softmax(dim=1), predict_logits(attacker, x).log_softmax(dim=1)))


@pytest.mark.parametrize(
    ("defense", "factor"),
    [(MAD(keep_argmax=False), 20), (MAD(), 20), (GradientRedirection(), 3), (ModelGuardW(), 20)],
    ids=repr,
)
def test_who_learns_from_the_answers_learns_less_of_the_victim(
    defense: Defense, factor: float, victim: nn.Module, data: Split
) -> None:
    assert stolen(defense, victim, data) > factor * stolen(Defense(), victim, data)


# MAD


class Watched:
    """A context that shows the networks it has handed out."""

    def __init__(self, ctx: Context) -> None:
        self.networks: list[nn.Module] = []

        def new_student(name: str | None = None) -> nn.Module:
            self.networks.append(ctx.new_student(name))
            return self.networks[-1]

        self.ctx = replace(ctx, new_student=new_student)


def jacobian(log_p: Tensor, weights: list[Tensor]) -> Tensor:
    """The gradients (K,D) of the log-probabilities (1,K) of one image, class by class."""
    grads = [torch.autograd.grad(value, weights, retain_graph=True) for value in log_p[0]]
    return torch.stack([torch.cat([part.flatten() for part in grad]) for grad in grads]).double()


def deviation(G: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The paper's objective for G (K,D) and answers (K,)."""
    return (F.normalize(G.T @ one, dim=0) - F.normalize(G.T @ other, dim=0)).square().sum()


def evenly(classes: int, chosen: tuple[int, ...]) -> Tensor:
    spread = torch.zeros(classes, dtype=torch.float64)
    spread[list(chosen)] = 1 / len(chosen)
    return spread


@pytest.mark.parametrize("keep_argmax", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_mad_moves_towards_the_extreme_point_that_turns_the_last_layers_gradient_most(
    keep_argmax: bool, classes: int
) -> None:
    x, z = torch.rand(12, 1, 8, 8, generator=generator(3)), rows(classes, 12)
    watched = Watched(context(Split(x, torch.zeros(12, dtype=torch.int64), classes)))
    service = MAD(epsilon=0.5, keep_argmax=keep_argmax).serve(Fixed(x, z), watched.ctx)
    (surrogate,) = watched.networks
    surrogate.eval()
    layer: Any = surrogate.get_submodule("classifier")
    for n, y_moved in enumerate(service(x).double().exp()):
        G, y = jacobian(-surrogate(x[n : n + 1]).log_softmax(dim=1), [layer.weight]), z[n].double().softmax(dim=0)
        sizes = range(1, classes + 1) if keep_argmax else [1]
        sets = [chosen for size in sizes for chosen in itertools.combinations(range(classes), size)]
        extremes = [evenly(classes, s) for s in sets if not keep_argmax or int(z[n].argmax()) in s]
        most = max(float(deviation(G, point, y)) for point in extremes)
        best = torch.stack([point for point in extremes if deviation(G, point, y) > most - 1e-6])
        share = (0.5 / l1(best, y[None])).clamp_max(1)[:, None]
        assert l1(y + share * (best - y), y_moved[None]).min() < 1e-5
        assert len(best) == 1 or classes == 2  # of two classes there are but two directions


class Fixed(nn.Module):
    """Has logits `z` (N,K) for images `x` (N,C,H,W), and knows no others."""

    def __init__(self, x: Tensor, z: Tensor) -> None:
        super().__init__()
        self.x, self.z = x, z

    def forward(self, x: Tensor) -> Tensor:
        return self.z[(x[:, None] == self.x).flatten(2).all(dim=2).byte().argmax(dim=1)]


def test_the_cosine_of_a_turn_is_that_of_the_gradients() -> None:
    y, guess, features = rows(4, 1).double().softmax(1)[0], rows(4, 1, seed=7).double().softmax(1)[0], torch.rand(5)
    G = ((guess - torch.eye(4, dtype=torch.float64))[:, :, None] * features.double()).flatten(1)
    turn = Turn(y[None], guess[None])
    for chosen in [(0,), (3,), (0, 2), (1, 2, 3), (0, 1, 2, 3)]:
        index = list(chosen)
        cosine = turn.cosine(turn.pull[:, index].sum(), guess[index].sum(), len(index))
        expected = 1 - deviation(G, evenly(4, chosen), y) / 2
        torch.testing.assert_close(cosine[0, 0], expected, rtol=0, atol=1e-9)


def test_mad_spends_its_budget_on_the_way_to_the_extreme_point() -> None:
    z = rows(10)
    y, guess, top = z.double().softmax(1), rows(10, seed=9).double().softmax(1), z.argmax(1, keepdim=True)
    for mad in (MAD(0.4, keep_argmax=False), MAD(0.4), MAD(2.0)):
        extreme = mad.extreme(y, guess, top)
        spent = l1(mad.perturbed(z, guess).double().exp(), y)
        expected = l1(extreme, y).clamp_max(mad.epsilon)
        torch.testing.assert_close(spent, expected, rtol=0, atol=4e-6)


def test_an_answer_that_says_what_the_surrogate_says_is_moved_all_the_same() -> None:
    z = torch.cat([torch.zeros(1, 5), rows(5, 3)])
    for mad in (MAD(keep_argmax=False), MAD()):
        log_p = mad.perturbed(z, z.double().softmax(1))
        assert not log_p.isnan().any()
        assert l1(log_p.exp(), z.softmax(1)).max() <= 1


def sets_of(turn: Turn, chosen: Tensor) -> Tensor:
    """The cosines (N,1) of sets given as zeros and ones (N,K)."""
    pull, guess = (turn.pull * chosen).sum(1, keepdim=True), (turn.guess * chosen).sum(1, keepdim=True)
    cosine: Tensor = turn.cosine(pull, guess, chosen.sum(1, keepdim=True))
    return cosine


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_sets_grown_class_by_class_are_nearly_the_best_of_all(classes: int) -> None:
    z = rows(classes, 200)
    turn, top = Turn(z.double().softmax(1), rows(classes, 200, 0.3, seed=8).double().softmax(1)), z.argmax(1, True)
    best, greedy = sets_of(turn, tried(turn, top)), sets_of(turn, grown(turn, top))
    assert (greedy >= best).all()
    assert (greedy == best).float().mean() > 0.9
    assert greedy.mean() < sets_of(turn, F.one_hot(top[:, 0], classes)).mean() or classes == 2


@pytest.mark.parametrize("share", [0.005, 0.01, 0.013, 0.017, 0.02, 0.023, 0.029, 0.03])
@pytest.mark.parametrize("count", [1, 7])
def test_of_sets_that_turn_as_much_the_first_is_taken_whoever_else_asks(share: float, count: int) -> None:
    guess = torch.tensor([[share, *[(1 - share) / 9] * 9]]).double().expand(count, -1)
    y = torch.tensor([[0.15, *[0.85 / 9] * 9]]).double().expand(count, -1)
    turn, top = Turn(y, guess), torch.zeros(count, 1, dtype=torch.int64)
    first_six = (torch.arange(10) < 6).double().expand(count, -1)
    for chosen in (tried(turn, top), grown(turn, top)):  # the best size is six, and any five go with the label
        assert torch.equal(chosen, first_six)


@pytest.mark.parametrize(("classes", "largest"), [(11, 11), (100, 12), (1000, 3), (2000, 2)])
def test_sets_grow_until_so_many_have_been_tried(classes: int, largest: int) -> None:
    assert sum(classes - size for size in range(1, largest)) < TRIES + classes
    z = rows(classes, 64)
    # A surrogate that is sure of another class: the wider the answer, the further off.
    turn, top = Turn(z.double().softmax(1), (-30 * z).double().softmax(1)), z.argmax(1, True)
    sizes = grown(turn, top).sum(dim=1)
    assert sizes.min() >= 1
    assert sizes.max() <= largest
    assert (grown(turn, top).gather(1, top) == 1).all()


def test_mads_surrogate_has_fresh_weights_and_expects_the_owners_images(victim: nn.Module, data: Split) -> None:
    ctx, ask = context(data), MAD()
    surrogate = ask.auxiliary(victim, ctx)
    fresh = context(data).new_student()
    for name, weight in fresh.named_parameters():
        assert torch.equal(surrogate.get_parameter(name), weight), name
    stem, norm = surrogate.get_submodule("features")[0], surrogate.get_submodule("features")[1]
    seen = torch.stack([stem(x).mean(dim=(0, 2, 3)) for x in data.x.split(ctx.recipe.batch)]).mean(0)
    assert_close(norm.running_mean, seen)
    assert not surrogate.training

    served = ask.serve(victim, replace(context(data), auxiliary=surrogate))(data.x)
    assert torch.equal(ask.serve(victim, context(data))(data.x), served)
    assert not torch.equal(ask.serve(victim, context(data, seed=3))(data.x), served)


def test_a_deep_fresh_surrogate_that_has_seen_images_is_sure_of_nothing() -> None:
    network = registry.load("model", "preresnet-56")
    x = torch.rand(64, 3, 32, 32, generator=generator(3))
    ctx = replace(context(Split(x, torch.arange(64) % 10, 10)), new_student=lambda: network((3, 32, 32), 10))
    sure = predict_logits(MAD().auxiliary(nn.Identity(), ctx), x).softmax(dim=1).amax(dim=1)
    assert predict_logits(network((3, 32, 32), 10).eval(), x).softmax(dim=1).amax(dim=1).mean() > 0.9  # as built
    assert sure.max() < 0.5


@pytest.mark.parametrize("mad", [MAD(0.5, keep_argmax=False), MAD(2.0)], ids=repr)
def test_mad_turns_gradients_further_than_noise_of_the_same_size(mad: MAD) -> None:
    z, guess = rows(10, 200), rows(10, 200, 0.1, seed=4).double().softmax(1)
    y = z.double().softmax(1)

    def cosine(answer: Tensor) -> Tensor:
        return F.cosine_similarity(guess - answer, guess - y, dim=1).mean()

    turned = mad.perturbed(z, guess).double().exp()
    random = rows(10, 200, 1.0, seed=6).double().softmax(1)
    noisy = y + l1(turned, y)[:, None] / l1(random, y)[:, None] * (random - y)
    assert cosine(turned) < cosine(noisy) - 0.02


# Gradient redirection


def polytope(y: Tensor, epsilon: float) -> tuple[list[numpy.ndarray], list[numpy.ndarray]]:
    """|y' - y|_1 <= epsilon for a solver: rows and bounds in the variables y' (K) and the moves (K)."""
    eye, zero, one = numpy.eye(len(y)), numpy.zeros((1, len(y))), numpy.ones((1, len(y)))
    rows = [numpy.hstack([eye, -eye]), numpy.hstack([-eye, -eye]), numpy.hstack([zero, one])]
    return rows, [y.numpy(), -y.numpy(), numpy.array([epsilon])]


def solved(costs: Tensor, rows: list[numpy.ndarray], bounds: list[numpy.ndarray]) -> Any:
    """The least of costs . y' on the simplex under `rows` <= `bounds`, by scipy."""
    zero, one = numpy.zeros(len(costs)), numpy.ones(len(costs))
    objective, simplex = numpy.concatenate([costs.numpy(), zero]), numpy.concatenate([one, zero])[None]
    limits, most, total = numpy.vstack(rows), numpy.concatenate(bounds), numpy.ones(1)
    exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    return linprog(objective, limits, most, simplex, total, options=exact)  # type: ignore[call-overload]


def problems(classes: int) -> Tensor:
    z = [rows(classes, 6, scale).double() for scale in (0.1, 1.0, 3.0, 10.0)]
    return torch.cat([*z, z[1].round(), 1e4 * torch.eye(classes)[:2], torch.zeros(1, classes)]).softmax(dim=1)


@pytest.mark.parametrize("classes", [2, 3, 10, 30])
@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.5, 1.0, 1.7, 2.0])
def test_the_greedy_redirection_is_the_solution_of_the_linear_programme(classes: int, epsilon: float) -> None:
    y, rise = problems(classes), rows(classes, len(problems(classes)), seed=9).double()
    rise[::3] = rise[::3].round()
    redirected = moved(y, rise, epsilon / 2)
    assert (redirected >= 0).all()
    torch.testing.assert_close(redirected.sum(1), torch.ones(len(y)).double())
    assert l1(redirected, y).max() <= epsilon + 1e-12
    for n in range(len(y)):
        best = -solved(-rise[n], *polytope(y[n], epsilon)).fun
        assert float(rise[n] @ redirected[n]) == pytest.approx(best, abs=1e-8)


def test_redirection_empties_the_worst_classes_into_the_best() -> None:
    y = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    for rise, half_width, expected in [
        ([0.0, 1.0, 2.0], 0.4, [0.1, 0.3, 0.6]),
        ([1.0, 0.0, 2.0], 0.4, [0.4, 0.0, 0.6]),
        ([9.0, 0.0, 0.0], 0.4, [0.9, 0.0, 0.1]),
        ([9.0, 0.0, 0.0], 1.0, [1.0, 0.0, 0.0]),
    ]:
        wanted = torch.tensor([expected], dtype=torch.float64)
        torch.testing.assert_close(moved(y, torch.tensor([rise]), half_width), wanted, rtol=0, atol=1e-15)


def test_an_emptied_class_is_withheld_and_not_nearly_so() -> None:
    z, rise = rows(10, 300), rows(10, 300, seed=9)
    left = moved(z.double().softmax(1), rise, 0.5)
    worst, best = rise.argmin(1, keepdim=True), rise.argmax(1, keepdim=True)
    assert (left > 0).any(dim=1).all()
    assert ((left.gather(1, worst) == 0) | (l1(left, z.double().softmax(1))[:, None] > 1 - 1e-9)).all()
    assert ((left == 0) | (left > 1e-12)).all()
    assert (left.gather(1, best) >= z.double().softmax(1).gather(1, best)).all()


@pytest.mark.parametrize("name", ["mini-8", "preresnet-20", "shufflenetv2", "takd-plane-2", "wrn-16-1"])
def test_the_rises_are_sums_over_the_gradients_of_all_weights(name: str) -> None:
    size = 8 if name == "mini-8" else 32
    net = context(Split(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64), 4), model=name).new_student()
    net.eval().requires_grad_(False)
    x = torch.rand(3, 3, size, size, generator=generator(1))
    rise = rises(net, x)
    net.requires_grad_(True)
    for n in range(3):
        G = jacobian(net(x[n : n + 1]).log_softmax(dim=1), list(net.parameters()))
        expected = G.sum(dim=1)
        room = 1e-4 * float(G.abs().sum(dim=1).max())  # sums of up to a million float32 numbers of both signs
        torch.testing.assert_close(rise[n].double(), expected, rtol=1e-3, atol=room)


def test_no_answer_of_its_own_moves_the_surrogate(data: Split) -> None:
    net = context(data).new_student().eval().requires_grad_(False)
    rise = rises(net, data.x)
    torch.testing.assert_close(
        (predict_logits(net, data.x).softmax(1) * rise).sum(1), torch.zeros(96), rtol=0, atol=1e-4
    )
    assert rise.abs().max() > 0.1


def test_a_redirected_thief_raises_its_weights(victim: nn.Module, data: Split) -> None:
    watched = Watched(context(data, epochs=12))
    service = GradientRedirection().serve(victim, watched.ctx)
    (surrogate,) = watched.networks
    truth = predict_logits(victim, data.x).log_softmax(1)

    def rise(log_p: Tensor) -> float:
        """By how much a step of gradient descent on the answers moves the sum of all weights."""
        surrogate.requires_grad_(True)
        loss = F.cross_entropy(surrogate(data.x), log_p.exp())
        grads = torch.autograd.grad(loss, list(surrogate.parameters()))
        surrogate.requires_grad_(False)
        return -float(sum(part.sum() for part in grads))

    noise = rows(3, 96).softmax(1)
    noisy = truth.exp() + 0.999 / l1(noise, truth.exp()).clamp_min(1)[:, None] * (noise - truth.exp())
    redirected = service(data.x)
    rise_per_answer = rises(surrogate, data.x)
    assert rise(redirected) == pytest.approx(float((rise_per_answer * redirected.exp()).sum(1).mean()), abs=1e-3)
    assert rise(redirected) > max(rise(truth), rise(noisy.log())) + 0.1


class Progress(Log):
    """Counts the epochs it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = 0

    def progress(self, share: float, text: str) -> None:
        self.epochs += 1


@pytest.mark.parametrize("epochs", [1, 10])
def test_the_surrogate_learns_the_victims_answers_for_so_many_epochs(
    epochs: int, victim: nn.Module, data: Split
) -> None:
    log = Progress()
    watched = Watched(replace(context(data, epochs=40), log=log))
    GradientRedirection(epochs=epochs).serve(victim, watched.ctx)
    (surrogate,) = watched.networks
    assert log.epochs == epochs
    far = kl(predict_logits(victim, data.x).softmax(1), predict_logits(surrogate, data.x).log_softmax(1))
    assert (far < 0.2) == (epochs == 10)


# ModelGuard-W


@pytest.mark.parametrize("classes", [2, 3, 10, 30])
@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.3, 1.0, 1.7, 2.0])
def test_the_least_telling_answer_is_the_solution_of_the_linear_programme(classes: int, epsilon: float) -> None:
    y = problems(classes)
    top = y.argmax(dim=1, keepdim=True)
    guarded = least_telling(y, top, epsilon)
    lead = guarded.gather(1, top) - guarded.scatter(1, top, -1.0).amax(dim=1, keepdim=True)
    assert (guarded >= 0).all()
    torch.testing.assert_close(guarded.sum(1), torch.ones(len(y)).double())
    assert l1(guarded, y).max() <= epsilon + 1e-8
    assert lead.min() >= MARGIN - 1e-8
    for n in range(len(y)):
        costs = (y[n] + 1e-6).log()
        limits, bounds = polytope(y[n], epsilon)
        others = numpy.delete(numpy.eye(classes) - numpy.eye(classes)[int(top[n])], int(top[n]), axis=0)
        limits.append(numpy.hstack([others, numpy.zeros_like(others)]))
        best = solved(costs, limits, [*bounds, numpy.full(classes - 1, -MARGIN)])
        assert best.status == 0
        assert float(costs @ guarded[n]) == pytest.approx(best.fun, abs=1e-7)


@pytest.mark.parametrize(
    ("y", "epsilon", "expected"),
    [
        ([0.9, 0.1, 0.0], 0.4, [0.7, 0.1, 0.2]),
        ([0.9, 0.1, 0.0], 1.2, [0.5 + MARGIN / 2, 0.0, 0.5 - MARGIN / 2]),
        ([0.34, 0.33, 0.33, 0.0], 2.0, [0.5 + MARGIN / 2, 0.0, 0.0, 0.5 - MARGIN / 2]),
        ([1.0, 0.0, 0.0, 0.0], 0.6, None),
        ([0.5, 0.5, 0.0], 2 * MARGIN, [0.5, 0.5 - MARGIN, MARGIN]),
    ],
)
def test_answers_guarded_by_hand(y: list[float], epsilon: float, expected: list[float] | None) -> None:
    truth = torch.tensor([y], dtype=torch.float64)
    guarded = least_telling(truth, truth.argmax(1, True), epsilon)
    if expected is None:  # of equal classes any may be filled; the winner pays
        torch.testing.assert_close(guarded[0, 0], truth[0, 0] - epsilon / 2)
    else:
        torch.testing.assert_close(guarded, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-8)


def test_classes_are_emptied_left_or_filled_and_hardly_any_in_between() -> None:
    z = rows(10, 300)
    y, top = z.double().softmax(1), z.argmax(1, True)
    guarded = least_telling(y, top, 0.8)
    most = guarded.gather(1, top) - MARGIN
    plain = (guarded == 0) | (guarded == y) | ((guarded - most).abs() < 1e-8)
    assert (plain.scatter(1, top, True).logical_not().sum(1) <= 2).all()
    assert ((guarded == 0) | (guarded > 1e-9) | (guarded == y)).all()


def test_an_answer_that_cannot_get_the_lead_it_needs_stays() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [3.0, 1.0, 0.0]])
    y = z.double().softmax(1)
    guarded = least_telling(y, z.argmax(1, True), 2e-5)
    assert torch.equal(guarded[:2], y[:2])
    assert not torch.equal(guarded[2], y[2])


def test_guarded_answers_are_less_sure(victim: nn.Module, data: Split) -> None:
    truth = predict_logits(victim, data.x).softmax(1)
    guarded = ModelGuardW().serve(victim, context(data))(data.x).exp()
    assert torch.special.entr(guarded).sum(1).mean() > 3 * torch.special.entr(truth).sum(1).mean()


# ModelGuard-S


def one_by_one(y: Tensor, top: Tensor, epsilon: float) -> tuple[Tensor, int]:
    """The paper's ordered quantiser as it is told: the answers (N,K), and how many of them were new."""
    memory: dict[int, list[Tensor]] = {}
    said = []
    for row, label in zip(y, top[:, 0].tolist(), strict=True):
        known = memory.setdefault(label, [])
        near = [old for old in known if (old - row).abs().sum() <= epsilon]
        if not near:
            known.append(row)
        said.append(near[0] if near else row)
    return torch.stack(said), sum(map(len, memory.values()))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0, 1.9])
@pytest.mark.parametrize("batch", [1, 7, 400])
def test_the_quantiser_answers_as_if_asked_one_by_one(classes: int, epsilon: float, batch: int) -> None:
    z = torch.cat([rows(classes, 200), rows(classes, 200, scale=1.0)])[torch.randperm(400, generator=generator(1))]
    service = ModelGuardS(epsilon).serve(nn.Flatten(), context(split_of(classes)))
    said = torch.cat([service(part[:, :, None, None]) for part in z.split(batch)])
    expected, new = one_by_one(z.double().softmax(1), z.argmax(1, True), epsilon - 2e-6)
    torch.testing.assert_close(said.double().exp(), expected, rtol=0, atol=1e-6)
    assert len({tuple(row) for row in said.tolist()}) == new


def asked(defense: Defense, parts: list[Tensor]) -> list[Tensor]:
    service = defense.serve(nn.Flatten(), context(split_of(parts[0].shape[1])))
    return [service(part[:, :, None, None]).exp() for part in parts]


def test_the_first_near_enough_answers_and_not_the_nearest() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.72, 0.28], [0.4, 0.6]])
    (said,) = asked(ModelGuardS(0.5), [p.log()])
    torch.testing.assert_close(said, p[[0, 1, 0, 3]])  # the second is 0.6 from the first, the last has another label


def test_the_quantiser_remembers_and_a_new_service_does_not() -> None:
    p = torch.tensor([[0.9, 0.1], [0.72, 0.28]])
    first, second = asked(ModelGuardS(0.5), [p[:1].log(), p[1:].log()])
    torch.testing.assert_close(torch.cat([first, second]), p[[0, 0]])
    (alone,) = asked(ModelGuardS(0.5), [p[1:].log()])
    torch.testing.assert_close(alone, p[1:])


def test_who_repeats_a_question_gets_the_same_answer() -> None:
    z = rows(10, 200)
    first, _, again = asked(ModelGuardS(0.3), [z, rows(10, 500, seed=8), z])
    assert torch.equal(first, again)


def test_different_answers_for_a_label_lie_further_apart_than_epsilon() -> None:
    (said,) = asked(ModelGuardS(0.5), [rows(5, 500)])
    different = said.unique(dim=0).double()
    far = torch.cdist(different, different, p=1) > 0.5 - 3e-6
    same_label = different.argmax(1)[:, None] == different.argmax(1)
    assert (far | ~same_label | torch.eye(len(different)).bool()).all()
    assert 5 < len(different) < 100


def test_a_thief_sees_few_answers(victim: nn.Module, data: Split) -> None:
    service = ModelGuardS().serve(victim, context(data))
    assert len(service(data.x).unique(dim=0)) <= 9
    assert ModelGuardS.stateful
    assert not ModelGuardW.stateful
