"""MAD: against brute force, its sets of classes, and its surrogate."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from helpers import blobs, context, generator, taught
from kdbench import registry
from kdbench.api import Context, Service, Split, predict_logits
from kdbench.defenses.gradient_redirection import GradientRedirection
from kdbench.defenses.mad import MAD, TRIES, Turn, grown, tried


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.fixture(scope="module")
def victim(data: Split) -> nn.Module:
    return taught(data, epochs=12, seed=1)


def rows(classes: int, count: int = 64, scale: float = 3.0, seed: int = 5) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(seed))


def split_of(classes: int) -> Split:
    """A split of which only the number of classes matters."""
    return Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), classes)


def answers(defense: Any, z: Tensor, seed: int = 0) -> Tensor:
    """The answers (N,K) to images for which the victim has logits `z`, and the surrogate something made up."""
    made_up = rows(z.shape[1], len(z), scale=1.0, seed=seed).double()
    if isinstance(defense, MAD):
        return defense.turned(z.log_softmax(dim=1), made_up.softmax(dim=1))
    if isinstance(defense, GradientRedirection):
        return defense.redirected(z.log_softmax(dim=1), made_up.float())
    service: Service = defense.serve(nn.Flatten(), context(split_of(z.shape[1])))  # an "image" is its logits
    return service(z[:, :, None, None])


def l1(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().sum(dim=1)


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
    surrogate.eval().requires_grad_(True)  # the service has frozen it; the test differentiates it
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
        spent = l1(mad.turned(z.log_softmax(dim=1), guess).double().exp(), y)
        expected = l1(extreme, y).clamp_max(mad.epsilon)
        torch.testing.assert_close(spent, expected, rtol=0, atol=4e-6)


def test_an_answer_that_says_what_the_surrogate_says_is_moved_all_the_same() -> None:
    z = torch.cat([torch.zeros(1, 5), rows(5, 3)])
    for mad in (MAD(keep_argmax=False), MAD()):
        log_p = mad.turned(z.log_softmax(dim=1), z.double().softmax(1))
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

    turned = mad.turned(z.log_softmax(dim=1), guess).double().exp()
    random = rows(10, 200, 1.0, seed=6).double().softmax(1)
    noisy = y + l1(turned, y)[:, None] / l1(random, y)[:, None] * (random - y)
    assert cosine(turned) < cosine(noisy) - 0.02
