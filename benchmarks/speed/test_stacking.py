"""Students as one stack against one after another, as ratios within one run: the small nets of the digits suite.

pytest benchmarks/speed/test_stacking.py --benchmark-enable -s      (a minute or two; one thread, as a worker has)
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
from kdbench.training.fused import FusedTraining
from kdbench.zoo.datasets import Digits

STUDENTS, EPOCHS, ROUNDS = 8, 4, 5
TEMPERATURES = (1, 2, 4, 6, 8, 12, 16, 20)

MethodRecord = Callable[[FusedTraining | None], None]


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
    """A teacher whom several students ask the same: it answers once."""

    def __init__(self, ask: QueryFunction) -> None:
        self._ask, self._x, self._z = ask, torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.equal(self._x, x):
            self._x, self._z = x, self._ask(x)
        return self._z


def temperatures(data: Split, precision: Precision, together: bool) -> list[MethodRecord]:
    """One victim, one seed, a temperature each: the same batches, so that one pass of the teacher serves a stack."""
    asks = [inference(network("mini-16", 100), context(data, 0, precision)) for _ in TEMPERATURES]
    teachers = [Shared(asks[0])] * STUDENTS if together else asks
    return [player(data, 0, T, teacher, precision) for T, teacher in zip(TEMPERATURES, teachers, strict=True)]


def kept(data: Split, precision: Precision, together: bool) -> list[MethodRecord]:
    """Eight victims and seeds, whose answers were asked once."""
    return [
        player(data, seed, 4, inference(network("mini-16", 100 + seed), context(data, 0, precision))(data.x), precision)
        for seed in range(STUDENTS)
    ]


def victims(data: Split, precision: Precision, together: bool) -> list[MethodRecord]:
    """The same thief against eight victims, each of which is asked about every augmented batch."""
    return [
        player(data, 0, 4, inference(network("mini-16", 100 + k), context(data, 0, precision)), precision)
        for k in range(STUDENTS)
    ]


def player(data: Split, seed: int, T: float, teacher: QueryFunction | Tensor, precision: Precision) -> MethodRecord:
    def play(fused: FusedTraining | None) -> None:
        ctx = replace(context(data, seed, precision), fused=fused)
        fit(ctx.new_student(), kd_loss(T, 0.9, labelled=True), data.x, (teacher, data.y), ctx)

    return play


def one_by_one(players: Sequence[MethodRecord]) -> None:
    for play in players:
        play(None)


def fused_network(players: Sequence[MethodRecord]) -> None:
    fused = FusedTraining()
    fused.play([lambda play=play: play(fused) for play in players])  # type: ignore[misc]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("make", "least"), [(temperatures, 2.0), (kept, 2.0), (victims, 1.3)])
def test_a_stack_is_faster_than_one_by_one(
    benchmark: BenchmarkFixture,
    data: Split,
    precision: Precision,
    make: Callable[[Split, Precision, bool], list[MethodRecord]],
    least: float,
) -> None:
    """Where every student has a teacher of its own, most of a stack's time is the teachers': no stack can share those."""
    solo, stack = make(data, precision, False), make(data, precision, True)
    times = take_turns({"one by one": lambda: one_by_one(solo), "stack": lambda: fused_network(stack)}, ROUNDS)
    images = STUDENTS * EPOCHS * len(data)
    rates = {name: f"{images / seconds:.0f} student images/s" for name, seconds in times.items()}
    benchmark.extra_info.update(rates)
    print(make.__name__, precision, rates, f"ratio {times['one by one'] / times['stack']:.2f}")
    benchmark.pedantic(lambda: fused_network(stack), rounds=1)
    assert times["one by one"] >= least * times["stack"]
