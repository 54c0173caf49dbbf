"""The referee's attacks against torchattacks called plainly on all images, as ratios within one run.

pytest benchmarks/speed/test_robustness.py --benchmark-enable -s      (minutes; one thread)

The images are scikit-learn's digits, four times as wide and with three equal colours, the network is the plain CNN. It
resists attacks of a small radius and has no defense against those of a large one. Plainly means in eval mode and else as
it comes from training: its parameters want gradients, which FAB of torchattacks computes and nobody needs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from pytest_benchmark.fixture import BenchmarkFixture
from timing import take_turns
from torch import Tensor, nn

from kdbench import registry
from kdbench.api import Context, Log, Recipe, Split, fit, seeded
from kdbench.evaluation.adversarial import Robustness, standing
from kdbench.game.roles import Role, derive
from kdbench.zoo.datasets import Digits

RESISTED, FELLING = 1 / 255, 96 / 255
ROUNDS = 2
SEED = 0


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def pictures(data: Split, count: int) -> Split:
    """The first images as (N,3,32,32)."""
    x = F.interpolate(data.x[:count], scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    return Split(x, data.y[:count], data.classes)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.set_num_threads(1)
    data = pictures(Digits().load(Path()).train, 900)
    with seeded(0):
        net: nn.Module = registry.load("model", "cnn")((3, 32, 32), 10)
    draws = torch.Generator().manual_seed(0)
    ctx = Context(data, Recipe(epochs=3, batch=64, lr=0.05), "cpu", 0, lambda name=None: net, draws, Log())
    fit(net, F.cross_entropy, data.x, data.y, ctx)
    return net.to(memory_format=torch.contiguous_format)


def plain_pgd(network: nn.Module, robustness: Robustness) -> Any:
    return torchattacks.PGD(network, eps=robustness.eps, alpha=robustness.pgd_step, steps=robustness.pgd_steps)


def plain_autoattack(network: nn.Module, robustness: Robustness) -> Any:
    """AutoAttack's standard sequence as torchattacks composes it, with the parameters of `robustness`."""
    common: dict[str, Any] = {"eps": robustness.eps, "norm": "Linf", "seed": derive(SEED, Role.EVALUATION, "adv_autoattack")}
    steps, some = common | {"steps": robustness.autoattack_steps}, robustness.autoattack_targets + 1
    parts = [
        torchattacks.APGD(network, **steps, loss="ce"),
        torchattacks.APGDT(network, **steps, n_classes=some),
        torchattacks.FAB(network, **steps, multi_targeted=True, n_classes=some),
        torchattacks.Square(network, **common, n_queries=robustness.autoattack_queries),
    ]
    return torchattacks.MultiAttack(parts)


def race(
    benchmark: BenchmarkFixture, name: str, network: nn.Module, data: Split, robustness: Robustness, attack: Any
) -> tuple[float, float]:
    """How many times faster the referee is than `attack` called plainly, and the share that stands; verdicts are equal."""
    verdicts: dict[str, Tensor] = {}

    def plainly() -> None:
        with seeded(derive(SEED, Role.EVALUATION, name)):
            verdicts["plain"] = network(attack(data.x, data.y)).argmax(dim=1) == data.y

    def referee() -> None:
        verdicts["referee"] = standing(network, data, robustness, SEED, name)

    candidates: dict[str, Callable[[], object]] = {"referee": referee, "plain": plainly}
    times = take_turns(candidates, ROUNDS)
    ratio, share = times["plain"] / times["referee"], float(verdicts["plain"].double().mean())
    benchmark.extra_info.update({**times, "ratio": ratio, "standing": share, "images": len(data)})
    print({who: f"{seconds:.2f} s" for who, seconds in times.items()}, f"{ratio:.2f} times, {share:.0%} stand")
    benchmark.pedantic(referee, rounds=1)  # type: ignore[no-untyped-call]
    assert torch.equal(verdicts["referee"], verdicts["plain"])
    return ratio, share


def test_pgd_on_a_network_that_resists(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    data, robustness = pictures(Digits().load(Path()).test, 256), Robustness(eps=RESISTED, pgd_step=RESISTED / 4)
    ratio, share = race(benchmark, "adv_pgd", network, data, robustness, plain_pgd(network, robustness))
    assert share > 0.7
    assert ratio >= 1.9


def test_pgd_on_an_undefended_network(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    data, robustness = pictures(Digits().load(Path()).test, 256), Robustness(eps=FELLING, pgd_step=FELLING / 4)
    ratio, share = race(benchmark, "adv_pgd", network, data, robustness, plain_pgd(network, robustness))
    assert share < 0.05
    assert ratio >= 10


def test_autoattack_on_a_network_that_resists(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    """A third of the standard's targets, a 25th of its steps and a 75th of its queries: its parts keep their shares."""
    data = pictures(Digits().load(Path()).test, 160)
    robustness = Robustness("full", RESISTED, autoattack_steps=4, autoattack_targets=3, autoattack_queries=67)
    ratio, share = race(benchmark, "adv_autoattack", network, data, robustness, plain_autoattack(network, robustness))
    assert share > 0.7
    assert ratio >= 2


def test_autoattack_on_an_undefended_network(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    """With the standard's parameters."""
    data, robustness = pictures(Digits().load(Path()).test, 96), Robustness("full", FELLING)
    ratio, share = race(benchmark, "adv_autoattack", network, data, robustness, plain_autoattack(network, robustness))
    assert share < 0.05
    assert ratio >= 4
