"""Students as one fused group against one after another, as ratios within one run: small networks on digits.

pytest benchmarks/speed/test_fused.py --benchmark-enable -s      (a minute or two; one thread, as a worker has)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import take_turns
from torch import Tensor, nn

from kdbench import registry
from kdbench.api import Context, Log, Precision, QueryFunction, Recipe, Split, fit, inference, seeded
from kdbench.attacks.kd import kd_loss
from kdbench.game.methods import EngineHooks
from kdbench.training.fused import FusedTraining
from kdbench.zoo.datasets import Digits

STUDENTS, EPOCHS, ROUNDS = 8, 4, 5
TEMPERATURES = (1, 2, 4, 6, 8, 12, 16, 20)

Method = Callable[[FusedTraining | None], None]


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> Split:
    return Digits().load(Path()).train


def network(name: str, seed: int) -> nn.Module:
    with seeded(seed):
        net: nn.Module = registry.load("model", name)((1, 8, 8), 10)
    return net.to(memory_format=torch.channels_last)


def context(data: Split, seed: int, precision: Precision) -> Context:
    recipe = Recipe(epochs=EPOCHS, batch=64, lr=0.1, schedule="cosine", crop=1)
    draws = torch.Generator().manual_seed(seed)
    return Context(data, recipe, "cpu", seed, lambda name=None: network("mini-8", seed), draws, Log(), precision)


class Shared:
    """A teacher that several students ask the same: it answers once."""

    def __init__(self, ask: QueryFunction) -> None:
        self._ask, self._x, self._z = ask, torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.equal(self._x, x):
            self._x, self._z = x, self._ask(x)
        return self._z


def temperatures(data: Split, precision: Precision, together: bool) -> list[Method]:
    """One victim, one seed, a temperature each: the same batches, so that one pass of the teacher serves a group."""
    asks = [inference(network("mini-16", 100), context(data, 0, precision)) for _ in TEMPERATURES]
    teachers = [Shared(asks[0])] * STUDENTS if together else asks
    return [distilling(data, 0, T, teacher, precision) for T, teacher in zip(TEMPERATURES, teachers, strict=True)]


def kept(data: Split, precision: Precision, together: bool) -> list[Method]:
    """Eight victims and seeds, whose answers were asked once."""
    return [
        distilling(
            data, seed, 4, inference(network("mini-16", 100 + seed), context(data, 0, precision))(data.x), precision
        )
        for seed in range(STUDENTS)
    ]


def victims(data: Split, precision: Precision, together: bool) -> list[Method]:
    """The same attacker against eight victims, each of which is asked about every augmented batch."""
    return [
        distilling(data, 0, 4, inference(network("mini-16", 100 + k), context(data, 0, precision)), precision)
        for k in range(STUDENTS)
    ]


def distilling(data: Split, seed: int, T: float, teacher: QueryFunction | Tensor, precision: Precision) -> Method:
    def run(fused: FusedTraining | None) -> None:
        ctx = replace(context(data, seed, precision), engine=EngineHooks(fused=fused))
        fit(ctx.new_student(), kd_loss(T, 0.9, labelled=True), data.x, (teacher, data.y), ctx)

    return run


def one_by_one(methods: Sequence[Method]) -> None:
    for run in methods:
        run(None)


def together(methods: Sequence[Method]) -> None:
    fused = FusedTraining()
    fused.run([lambda run=run: run(fused) for run in methods])  # type: ignore[misc]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("make", "least"), [(temperatures, 2.0), (kept, 2.0), (victims, 1.3)])
def test_a_fused_group_is_faster_than_one_by_one(
    benchmark: BenchmarkFixture,
    data: Split,
    precision: Precision,
    make: Callable[[Split, Precision, bool], list[Method]],
    least: float,
) -> None:
    """Where every student has a teacher of its own, most of a group's time is the teachers', which it cannot share."""
    solo, group = make(data, precision, False), make(data, precision, True)
    times = take_turns({"one by one": lambda: one_by_one(solo), "fused": lambda: together(group)}, ROUNDS)
    images = STUDENTS * EPOCHS * len(data)
    rates = {name: f"{images / seconds:.0f} student images/s" for name, seconds in times.items()}
    benchmark.extra_info.update(rates)
    print(make.__name__, precision, rates, f"ratio {times['one by one'] / times['fused']:.2f}")
    benchmark.pedantic(lambda: together(group), rounds=1)
    assert times["one by one"] >= least * times["fused"]
