"""Deep inversion against a bare loop, as ratios within one run.

pytest benchmarks/speed/test_inversion.py --benchmark-enable -s      (a minute or two; one thread)

The bare loop: forward, cross-entropy, backward to the images, Adam, on a batch in memory, over the same frozen network.
It has no statistics of features, no priors, no rolling and no best image, which are the attack.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from timing import take_turns
from torch import nn

from kdbench import registry
from kdbench.api import Context, Log, Precision, Recipe, Split, forward, seeded
from kdbench.attacks._features import Features
from kdbench.attacks.deep_inversion import DeepInversion, Objective

ROUNDS = 5


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def context(shape: tuple[int, int, int], precision: Precision) -> Context:
    none = Split(torch.empty(0, *shape), torch.empty(0, dtype=torch.long), 10)
    draws = torch.Generator().manual_seed(0)
    return Context(none, Recipe(), "cpu", 0, lambda name=None: nn.Identity(), draws, Log(), precision)


def victim(name: str, shape: tuple[int, int, int]) -> nn.Module:
    with seeded(0):
        net: nn.Module = registry.load("model", name)(shape, 10)
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def bare(network: nn.Module, attack: DeepInversion, ctx: Context) -> Callable[[], None]:
    y = torch.arange(attack.batch) % 10

    def iterations() -> None:
        u = torch.randn(attack.batch, *ctx.data.shape).clamp_(-2, 2).requires_grad_()
        adam = torch.optim.Adam([u], attack.lr, fused=True)
        for _ in range(attack.iterations):
            z = forward(network, 0.5 + 0.25 * u, ctx)
            (u.grad,) = torch.autograd.grad(F.cross_entropy(z, y), u)
            adam.step()

    return iterations


def inversion(network: nn.Module, attack: DeepInversion, ctx: Context) -> Callable[[], None]:
    def iterations() -> None:
        with Features(network) as features:
            attack._invert(0, Objective(attack, features, None, ctx), ctx)

    return iterations


@pytest.mark.parametrize(
    ("name", "shape", "batch", "iterations", "precision", "most"),
    [
        ("resnet-18", (3, 32, 32), 64, 3, "fp32", 1.15),
        ("resnet-18", (3, 32, 32), 64, 3, "bf16", 1.15),
        ("mini-16", (1, 8, 8), 256, 100, "fp32", 1.3),
    ],
)
def test_an_inversion_is_near_a_bare_loop(
    benchmark: BenchmarkFixture,
    name: str,
    shape: tuple[int, int, int],
    batch: int,
    iterations: int,
    precision: Precision,
    most: float,
) -> None:
    """The network of the digits suite is so small that priors on its images and bookkeeping weigh more."""
    network, ctx = victim(name, shape), context(shape, precision)
    attack = DeepInversion(images=batch, batch=batch, iterations=iterations, jitter=1)
    loops = {"inversion": inversion(network, attack, ctx), "bare": bare(network, attack, ctx)}
    times = take_turns(loops, ROUNDS)
    benchmark.extra_info.update({loop: f"{1e3 * t / iterations:.2f} ms an iteration" for loop, t in times.items()})
    print(name, precision, benchmark.extra_info, f"ratio {times['inversion'] / times['bare']:.3f}")
    benchmark.pedantic(loops["inversion"], rounds=1)
    assert times["inversion"] <= most * times["bare"]
