"""Training against a bare loop and against the usual research loop, as ratios within one run.

MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 pytest benchmarks/speed/test_training.py \
    --benchmark-enable -s      (ten minutes; as many threads as cores, the allocator as in a worker)
"""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from apart import OURS, Apart
from loops import ALPHA, Pictures, ResearchLoop, T, bare
from pytest_benchmark.fixture import BenchmarkFixture
from timing import take_turns
from torch import Tensor, nn

from kdbench import registry
from kdbench.api import Context, Log, Precision, Recipe, Split, fit, inference, kd
from kdbench.attacks.kd import kd_loss
from kdbench.defenses.nasty import Nasty
from kdbench.training.augmentation import augmented

THREADS = os.cpu_count() or 1
PAIRS = [("resnet-18", "cnn"), ("preresnet-20", "preresnet-20")]
ROUNDS = 5
COMPARED = 2048  # images of an epoch, where loops run in processes of their own


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = registry.load("model", name)((3, 32, 32), 10)
    return net.to(memory_format=torch.channels_last)


def pixels(count: int) -> tuple[Tensor, Tensor]:
    """Bytes (N,3,32,32) and labels: the content of the images does not change the arithmetic."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(10, (count,), generator=generator)


def context(data: Split, precision: Precision, name: str) -> Context:
    recipe = Recipe(epochs=1, batch=128, lr=0.1, crop=4, flip=True)
    generator = torch.Generator().manual_seed(0)
    return Context(data, recipe, "cpu", 0, lambda n=None: network(n or name, 0), generator, Log(), precision)


def in_memory(data: Split, ctx: Context) -> list[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches, made beforehand."""
    cut = augmented(data.x, ctx.recipe, ctx.generator)
    order = torch.arange(len(data)).split(ctx.recipe.batch)
    return [(cut(index), data.y[index]) for index in order]


def record(benchmark: BenchmarkFixture, times: dict[str, float], images: int, ours: Callable[[], object]) -> None:
    benchmark.extra_info.update({f"{name}_images_per_second": round(images / t, 1) for name, t in times.items()})
    print({name: f"{images / t:.0f} images/s" for name, t in times.items()})
    benchmark.pedantic(ours, rounds=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_distillation_is_near_the_bare_loop(
    benchmark: BenchmarkFixture, teacher: str, student: str, precision: Precision
) -> None:
    """At most 1.05 times forward, backward and step of the same modules on batches in memory."""
    images, y = pixels(1024 if teacher == "resnet-18" else 2048)
    data = Split(images, y, 10).to("cpu")
    ctx = context(data, precision, student)
    victim = inference(network(teacher, 1), ctx)

    def loss(z: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answers = victim(x)
        return kd(z.float(), answers.float(), labels, T, ALPHA)

    ours, theirs = network(student, 2), network(student, 2)
    candidates = {
        "fit": lambda: fit(ours, kd_loss(T, ALPHA, labelled=True), data.x, (victim, data.y), ctx),
        "bare": bare(theirs, in_memory(data, ctx), loss, precision == "bf16"),
    }
    times = take_turns(candidates, ROUNDS)
    record(benchmark, times, len(data), candidates["fit"])
    assert times["fit"] <= 1.05 * times["bare"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nasty_training_is_near_the_bare_loop(benchmark: BenchmarkFixture, precision: Precision) -> None:
    images, y = pixels(2048)
    data = Split(images, y, 10).to("cpu")
    ctx = context(data, precision, "preresnet-20")
    nasty, adversary = Nasty(), inference(network("preresnet-20", 1), ctx)

    def loss(z: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answers = adversary(x)
        return nasty.loss(z.float(), (answers.float(), labels))

    ours, theirs = network("preresnet-20", 2), network("preresnet-20", 2)
    candidates = {
        "fit": lambda: fit(ours, nasty.loss, data.x, (adversary, data.y), ctx),
        "bare": bare(theirs, in_memory(data, ctx), loss, precision == "bf16"),
    }
    times = take_turns(candidates, ROUNDS)
    record(benchmark, times, len(data), candidates["fit"])
    assert times["fit"] <= 1.05 * times["bare"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_training_is_near_the_bare_loop(benchmark: BenchmarkFixture, precision: Precision) -> None:
    """Three epochs, for images are padded once a fit: of a real fit that is a small part."""
    images, y = pixels(4096)
    data = Split(images, y, 10).to("cpu")
    ctx = context(data, precision, "cnn").training(epochs=3)
    ours, theirs = network("cnn", 2), network("cnn", 2)
    candidates = {
        "fit": lambda: fit(ours, F.cross_entropy, data.x, data.y, ctx),
        "bare": bare(
            theirs,
            3 * in_memory(data, ctx),
            lambda z, x, labels: F.cross_entropy(z.float(), labels),
            precision == "bf16",
        ),
    }
    times = take_turns(candidates, ROUNDS)
    record(benchmark, times, 3 * len(data), candidates["fit"])
    assert times["fit"] <= 1.05 * times["bare"]


@pytest.mark.parametrize(("precision", "shipped", "best"), [("fp32", 1.9, 1.5), ("bf16", 3.0, 2.5)])
def test_distillation_is_ahead_of_the_research_loop(
    benchmark: BenchmarkFixture, precision: Precision, shipped: float, best: float
) -> None:
    """ResNet-18 -> plain CNN, against the loop with 4 loader workers as shipped and with its best number of workers."""
    research = {f"workers {n}": Apart({}, research_loop, n, COMPARED) for n in (0, 1, 2, 4)}
    ours = Apart(OURS, distillation, precision, COMPARED, False)
    times = compare(benchmark, {"kdbench": ours, **research}, COMPARED)
    assert times["workers 4"] >= shipped * times["kdbench"]
    assert min(times[name] for name in research) >= best * times["kdbench"]


def test_answers_that_are_kept_make_a_student_epoch_cheap(benchmark: BenchmarkFixture) -> None:
    """ResNet-18 -> plain CNN with the answers asked once: at least 25 times the research loop as shipped."""
    candidates = {
        "kdbench": Apart(OURS, distillation, "bf16", COMPARED, True),
        "workers 4": Apart({}, research_loop, 4, COMPARED),
    }
    times = compare(benchmark, candidates, COMPARED)
    assert times["workers 4"] >= 25 * times["kdbench"]


def compare(benchmark: BenchmarkFixture, candidates: dict[str, Apart], images: int) -> dict[str, float]:
    """Seconds of an epoch of each, taken in turns."""
    try:
        times = take_turns(candidates, 2)
        record(benchmark, times, images, candidates["kdbench"])
    finally:
        for candidate in candidates.values():
            candidate.close()
    return times


def distillation(precision: Precision, count: int, kept: bool) -> Callable[[], None]:
    """kdbench's epoch: the teacher asked about every augmented batch, or its answers kept."""
    torch.set_num_threads(THREADS)
    images, y = pixels(count)
    data = Split(images, y, 10).to("cpu")
    ctx = context(data, precision, "cnn")
    victim = inference(network("resnet-18", 1), ctx)
    target = torch.cat([victim(x).log_softmax(dim=1) for x in data.x.split(256)]) if kept else victim
    student = network("cnn", 2)
    return lambda: fit(student, kd_loss(T, ALPHA, labelled=True), data.x, (target, data.y), ctx)


def research_loop(workers: int, count: int) -> Callable[[], None]:
    """The usual loop's epoch."""
    torch.set_num_threads(THREADS)
    return ResearchLoop(plain("cnn", 2), plain("resnet-18", 1), Pictures(*pixels(count)), workers)


def plain(name: str, seed: int) -> nn.Module:
    """Channels first, as the research loop has it."""
    return network(name, seed).to(memory_format=torch.contiguous_format)
