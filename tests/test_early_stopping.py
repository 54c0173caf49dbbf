"""Early stopping gives the verdicts of torchattacks called plainly, image by image, with fewer queries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from simple_networks import Means
from torch import Tensor, nn

from helpers import context
from kdbench.api import Split, fit, seeded
from kdbench.evaluation.adversarial import Robustness, robust_examples
from kdbench.evaluation.early_stopping import LARGEST, LASTING_LEAD, LEAST, EarlyStopping, batch_size
from kdbench.evaluation.network import EvaluatedNetwork
from kdbench.game.roles import Role, derive
from kdbench.training.bn_folding import folded
from kdbench.zoo.datasets import Digits

COUNT = 60
STEPS = 12
RADII = {"most robust": 0.02, "some robust": 0.1, "few robust": 0.2}
Make = Callable[[nn.Module, float], Any]
COMMON = {"norm": "Linf", "n_restarts": 1, "seed": 5}
ATTACKS: dict[str, Make] = {
    "fgsm": lambda net, eps: torchattacks.FGSM(net, eps=eps),
    "pgd": lambda net, eps: torchattacks.PGD(net, eps=eps, alpha=eps / 4, steps=STEPS),
    "apgd": lambda net, eps: torchattacks.APGD(net, eps=eps, steps=STEPS, **COMMON),
    "apgd, two runs": lambda net, eps: torchattacks.APGD(net, eps=eps, steps=STEPS, **COMMON | {"n_restarts": 2}),
    "apgdt": lambda net, eps: torchattacks.APGDT(net, eps=eps, steps=STEPS, n_classes=5, **COMMON),
    "fab": lambda net, eps: torchattacks.FAB(net, eps=eps, steps=5, multi_targeted=True, n_classes=4, **COMMON),
    "square": lambda net, eps: torchattacks.Square(net, eps=eps, n_queries=60, **COMMON),
}


class Counted(nn.Module):
    """The same network; it counts the images of its queries, and the most of them at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images, self.most = network, 0, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        self.most = max(self.most, len(x))
        z: Tensor = self.network(x)
        return z


def grey(*levels: float) -> tuple[Tensor, Tensor]:
    """Flat images 1x2x2, all of class 0."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 1, 2, 2).clone(), torch.zeros(len(levels)).long()


def descent(network: nn.Module, step: float, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Darkens images by `step`, `steps` times, where the network's gradient is not 0; returns the last ones."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(steps):
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(network(x), y)
            x = x + step * torch.autograd.grad(loss, x)[0].sign()
        return x.detach()

    return attack


@pytest.fixture(scope="module")
def digits() -> Split:
    return Digits().load(Path()).test.take(torch.arange(COUNT))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    data = Digits().load(Path()).train
    ctx = context(data, epochs=12)
    network = ctx.new_student()
    fit(network, F.cross_entropy, data.x, data.y, ctx)
    return network.requires_grad_(False)


def with_early_stopping(name: str, network: EarlyStopping, attack: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """As an evaluation runs it."""
    plainly: Callable[[Tensor, Tensor], Tensor] = attack
    if name == "square":
        return plainly
    if name.startswith("apgd"):
        return network.stopping_runs_early(attack)
    return network.stopping_early(plainly) if name == "pgd" else network.in_batches(plainly)


def misclassified(attack: Callable[[Tensor, Tensor], Tensor], network: nn.Module, data: Split) -> Tensor:
    """Which images (N,) the network itself gets wrong after the attack."""
    with seeded(3):
        moved = attack(data.x, data.y)
    assert moved.shape == data.x.shape
    wrong: Tensor = network(moved).argmax(dim=1) != data.y
    return wrong


# The verdicts


@pytest.mark.parametrize("eps", RADII.values(), ids=RADII)
@pytest.mark.parametrize("name", ATTACKS)
def test_each_image_gets_the_verdict_of_torchattacks_called_plainly(
    name: str, eps: float, net: nn.Module, digits: Split
) -> None:
    expected = misclassified(ATTACKS[name](net, eps), net, digits)
    form = folded(net, digits.x)
    for size in (7, COUNT):
        network = EarlyStopping(form, size)
        assert torch.equal(
            misclassified(with_early_stopping(name, network, ATTACKS[name](network, eps)), net, digits), expected
        )


def test_the_radii_above_leave_most_some_and_few_images_robust(net: nn.Module, digits: Split) -> None:
    most, some, few = (
        float((~misclassified(ATTACKS["pgd"](net, eps), net, digits)).double().mean()) for eps in RADII.values()
    )
    assert few < 0.1 < some < 0.7 < most


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgdt"])
def test_examples_lie_in_the_ball(name: str, net: nn.Module, digits: Split) -> None:
    network, eps = EarlyStopping(net, 16), RADII["some robust"]
    moved = with_early_stopping(name, network, ATTACKS[name](network, eps))(digits.x, digits.y).detach()
    assert float((moved - digits.x).abs().max()) <= eps + 1e-6
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1


@pytest.mark.parametrize("size", [1, 7, COUNT])
def test_random_numbers_are_drawn_as_for_all_images_at_once(size: int, digits: Split) -> None:
    """Whichever images are misclassified by then: a start is drawn for each."""

    def start(x: Tensor, y: Tensor) -> Tensor:
        return x + torch.empty_like(x).uniform_(-1, 1)

    with seeded(3):
        expected = start(digits.x, digits.y)
    network = EarlyStopping(Means(), size)
    for attack in (network.in_batches(start), network.stopping_early(start)):
        with seeded(3):
            assert torch.equal(attack(digits.x, digits.y), expected)


@pytest.mark.parametrize("step", [0.025, 0.1, 0.3], ids=["short", "long", "there and back"])
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_pgd_of_an_evaluation_gives_the_verdicts_of_the_whole_set(
    step: float, eps: float, net: nn.Module, digits: Split
) -> None:
    """Also where steps are so long that misclassified images recover: then each image gets all of them."""
    robustness = Robustness(eps=eps, pgd_step=step)
    plain = torchattacks.PGD(net, eps=eps, alpha=step, steps=20)
    with seeded(derive(4, Role.EVALUATION, "pgd")):
        expected = net(plain(digits.x, digits.y)).argmax(dim=1) == digits.y
    assert torch.equal(robust_examples(EvaluatedNetwork(net, digits.x), digits, robustness, 4, "pgd"), expected)


@pytest.mark.parametrize("eps", RADII.values(), ids=RADII)
def test_autoattack_of_an_evaluation_gives_the_verdicts_of_its_parts_in_turn(
    eps: float, net: nn.Module, digits: Split
) -> None:
    robustness = Robustness("full", eps, autoattack_steps=STEPS, autoattack_targets=4, autoattack_queries=60)
    common: dict[str, Any] = {
        "norm": "Linf",
        "eps": eps,
        "n_restarts": 1,
        "seed": derive(4, Role.EVALUATION, "autoattack"),
    }
    parts = [
        torchattacks.APGD(net, **common, steps=STEPS, loss="ce"),
        torchattacks.APGDT(net, **common, steps=STEPS, n_classes=5),
        torchattacks.FAB(net, **common, steps=STEPS, multi_targeted=True, n_classes=5),
        torchattacks.Square(net, **common, n_queries=60, loss="margin", resc_schedule=False),
    ]
    with seeded(derive(4, Role.EVALUATION, "autoattack")):
        moved = torchattacks.MultiAttack(parts)(digits.x, digits.y)
    expected = net(moved).argmax(dim=1) == digits.y
    assert torch.equal(robust_examples(EvaluatedNetwork(net, digits.x), digits, robustness, 4, "autoattack"), expected)


# Active examples


def test_an_image_stops_where_another_class_leads_clearly_and_the_others_go_on() -> None:
    """0.58 and 0.52 are misclassified after nine and three steps of 0.01, as the next query shows; 0.9 is robust."""
    network = EarlyStopping(Means(), 16)
    moved = network.stopping_early(descent(network, 0.01, 20))(*grey(0.58, 0.52, 0.9))
    assert torch.allclose(moved[:, 0, 0, 0], torch.tensor([0.49, 0.49, 0.7]), atol=1e-5)


def test_an_image_whose_other_class_leads_by_less_than_the_lasting_lead_stays_active() -> None:
    class Close(Means):
        def forward(self, x: Tensor) -> Tensor:
            """A third class far below: the spread of the logits is 10."""
            return torch.cat([super().forward(x), torch.full((len(x), 1), -10.0)], dim=1)

    network = EarlyStopping(Close(steepness=10 * LASTING_LEAD / 0.1), 16)
    moved = network.stopping_early(descent(network, 0.01, 20))(*grey(0.505))
    assert 0.38 < float(moved[0, 0, 0, 0]) < 0.41  # not at 0.5 minus a step, where another class first leads


def test_misclassified_images_are_not_asked_about_again_and_the_attack_ends_with_the_last() -> None:
    counted = Counted(Means())
    network = EarlyStopping(counted, 16)
    network.stopping_early(descent(network, 0.01, 1000))(*grey(0.505, 0.505, 0.525))
    # The second query finds two misclassified, the fourth the last one.
    assert counted.images == 3 + 3 + 1 + 1


def test_a_robust_network_is_asked_as_often_as_plainly_and_in_no_larger_batches(digits: Split) -> None:
    plain, counted = Counted(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), Counted(nn.Identity())
    counted.network = plain.network
    y = plain.network(digits.x).argmax(dim=1)
    network, eps = EarlyStopping(counted, 16), 1e-6
    ATTACKS["pgd"](plain, eps)(digits.x, y)
    network.stopping_early(ATTACKS["pgd"](network, eps))(digits.x, y)
    assert counted.images == plain.images == STEPS * COUNT
    assert (plain.most, counted.most) == (COUNT, 16)


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgdt"])
def test_a_network_that_is_easy_to_fool_is_asked_less_than_half_as_often(
    name: str, net: nn.Module, digits: Split
) -> None:
    plain, counted = Counted(net), Counted(net)
    network = EarlyStopping(counted, 16)
    ATTACKS[name](plain, 0.3)(digits.x, digits.y)
    with_early_stopping(name, network, ATTACKS[name](network, 0.3))(digits.x, digits.y)
    assert 2 * counted.images < plain.images


def test_the_attack_gets_the_last_answer_of_a_misclassified_image_and_no_gradient() -> None:
    answers: list[Tensor] = []
    slopes: list[Tensor] = []
    network = EarlyStopping(Means(), 16)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        for darker in (0.2, 0.1, 0.05):
            x = (x - darker).detach().requires_grad_()
            z = network(x)
            answers.append(z.detach())
            slopes.append(torch.autograd.grad(z.sum(), x)[0].flatten(1).norm(dim=1))
        return x.detach()

    network.stopping_early(attack)(*grey(0.6, 1.0))
    assert torch.allclose(torch.stack(answers)[:, :, 0], torch.tensor([[-0.1, 0.3], [-0.1, 0.2], [-0.1, 0.15]]))
    assert [(slope > 0).tolist() for slope in slopes] == [[True, True], [False, True], [False, True]]


@pytest.mark.parametrize("answer", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_answers_in_which_no_class_leads_misclassify_nothing(answer: float, digits: Split) -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 10), answer)

    network = EarlyStopping(Always(), 16)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        network(x)
        return x + 1

    assert torch.equal(network.stopping_early(attack)(digits.x, digits.y), digits.x + 1)


def test_outside_an_attack_the_network_answers_as_itself_also_after_an_attack_failed(
    net: nn.Module, digits: Split
) -> None:
    network = EarlyStopping(net, 7)

    def fails(x: Tensor, y: Tensor) -> Tensor:
        network(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        network.stopping_early(fails)(digits.x, digits.y)
    assert torch.allclose(network(digits.x), net(digits.x), atol=1e-5)


def test_attacks_leave_the_network_in_eval_mode(net: nn.Module, digits: Split) -> None:
    network = EarlyStopping(net, 16)
    for name, make in ATTACKS.items():
        with_early_stopping(name, network, make(network, 0.2))(digits.x[:3], digits.y[:3])
    assert not any(layer.training for layer in network.modules())


# Batches


def test_a_batch_is_as_many_images_as_the_cache_holds_within_bounds() -> None:
    assert batch_size(torch.empty(0, 1, 8, 8)) == LARGEST
    assert batch_size(torch.empty(0, 3, 32, 32)) == 64
    assert batch_size(torch.empty(0, 3, 224, 224)) == LEAST
