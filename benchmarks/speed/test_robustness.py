"""Attacks as an evaluation runs them against torchattacks called plainly on all images, as ratios within one run.

pytest benchmarks/speed/test_robustness.py --benchmark-enable -s      (minutes; one thread)

The images are scikit-learn's digits, four times as wide and with three equal colours, the network is the plain CNN. It
is robust at a small radius and not at a large one. Plainly means in eval mode and else as it is after training: its
parameters require gradients, which FAB of torchattacks computes for no purpose.
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
from kdbench.evaluation.adversarial import AttackName, Robustness, robust_examples
from kdbench.evaluation.network import EvaluatedNetwork
from kdbench.game.roles import Role, derive
from kdbench.zoo.datasets import Digits

SMALL, LARGE = 1 / 255, 96 / 255  # radii
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
    common: dict[str, Any] = {
        "eps": robustness.eps,
        "norm": "Linf",
        "seed": derive(SEED, Role.EVALUATION, "autoattack"),
    }
    steps, some = common | {"steps": robustness.autoattack_steps}, robustness.autoattack_targets + 1
    parts = [
        torchattacks.APGD(network, **steps, loss="ce"),
        torchattacks.APGDT(network, **steps, n_classes=some),
        torchattacks.FAB(network, **steps, multi_targeted=True, n_classes=some),
        torchattacks.Square(network, **common, n_queries=robustness.autoattack_queries),
    ]
    return torchattacks.MultiAttack(parts)


def compare(
    benchmark: BenchmarkFixture, name: AttackName, network: nn.Module, data: Split, robustness: Robustness, attack: Any
) -> tuple[float, float]:
    """How many times faster an evaluation is than `attack` called plainly, and the robust share; verdicts are equal."""
    verdicts: dict[str, Tensor] = {}

    def plainly() -> None:
        with seeded(derive(SEED, Role.EVALUATION, name)):
            verdicts["plain"] = network(attack(data.x, data.y)).argmax(dim=1) == data.y

    def evaluation() -> None:
        evaluated = EvaluatedNetwork(network, data.x)
        verdicts["evaluation"] = robust_examples(evaluated, data, robustness, SEED, name)

    candidates: dict[str, Callable[[], object]] = {"evaluation": evaluation, "plain": plainly}
    times = take_turns(candidates, ROUNDS)
    ratio, share = times["plain"] / times["evaluation"], float(verdicts["plain"].double().mean())
    benchmark.extra_info.update({**times, "ratio": ratio, "robust": share, "images": len(data)})
    print({who: f"{seconds:.2f} s" for who, seconds in times.items()}, f"{ratio:.2f} times, {share:.0%} robust")
    benchmark.pedantic(evaluation, rounds=1)  # type: ignore[no-untyped-call]
    assert torch.equal(verdicts["evaluation"], verdicts["plain"])
    return ratio, share


def test_pgd_on_a_robust_network(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    data, robustness = pictures(Digits().load(Path()).test, 256), Robustness(eps=SMALL, pgd_step=SMALL / 4)
    ratio, share = compare(benchmark, "pgd", network, data, robustness, plain_pgd(network, robustness))
    assert share > 0.7
    assert ratio >= 1.9


def test_pgd_on_an_undefended_network(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    data, robustness = pictures(Digits().load(Path()).test, 256), Robustness(eps=LARGE, pgd_step=LARGE / 4)
    ratio, share = compare(benchmark, "pgd", network, data, robustness, plain_pgd(network, robustness))
    assert share < 0.05
    assert ratio >= 10


def test_autoattack_on_a_robust_network(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    """A third of the standard's targets, a 25th of its steps and a 75th of its queries: its parts keep their shares."""
    data = pictures(Digits().load(Path()).test, 160)
    robustness = Robustness("full", SMALL, autoattack_steps=4, autoattack_targets=3, autoattack_queries=67)
    ratio, share = compare(benchmark, "autoattack", network, data, robustness, plain_autoattack(network, robustness))
    assert share > 0.7
    assert ratio >= 2


def test_autoattack_on_an_undefended_network(benchmark: BenchmarkFixture, network: nn.Module) -> None:
    """With the standard's parameters."""
    data, robustness = pictures(Digits().load(Path()).test, 96), Robustness("full", LARGE)
    ratio, share = compare(benchmark, "autoattack", network, data, robustness, plain_autoattack(network, robustness))
    assert share < 0.05
    assert ratio >= 4
