"""Images/s of ResNet-18 training and distillation on an accelerator: kdbench, a bare loop, the usual research loop.

python benchmarks/speed/accelerator.py --device cuda                     the table, and what the Nasty Teacher's would cost
python benchmarks/speed/accelerator.py --device cpu --images 256 --network preresnet-20        to see that it works
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import pandas as pd
import torch
import torch.nn.functional as F
from loops import ALPHA, Batches, Pictures, ResearchLoop, T, bare
from torch import Tensor, nn

from kdbench import registry
from kdbench.api import Context, Log, Precision, Recipe, Split, fit, inference, kd
from kdbench.attacks.kd import kd_loss
from kdbench.defenses.nasty import Nasty
from kdbench.training.augmentation import augmented

IMAGES, CLASSES, BATCH = 50_000, 10, 128  # of CIFAR-10, and of all loops here
# The Nasty Teacher's CIFAR-10 table (ICLR 2021): epochs of each network, for one teacher architecture.
TEACHERS, STUDENTS = 160, {"cnn": 100, "preresnet-20": 160, "preresnet-32": 160, "resnet-18": 160}

Epoch = Callable[[], object]


class Bench:
    """The loops of one task on the same made-up images: their content does not change the arithmetic."""

    def __init__(self, device: str, images: int, precision: Precision, compile_: bool) -> None:
        self.device, self.precision, self.compile = device, precision, compile_
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(CLASSES, (images,), generator=generator)
        self.data = Split(self.pixels, self.labels, CLASSES).to(device)

    def network(self, name: str, seed: int = 0) -> nn.Module:
        """A registered network on the device, channels last."""
        torch.manual_seed(seed)
        network: nn.Module = registry.load("model", name)((3, 32, 32), CLASSES)
        return network.to(self.device, memory_format=torch.channels_last)

    def context(self, compile_: bool = False) -> Context:
        """A context for training one epoch."""
        recipe = Recipe(epochs=1, batch=BATCH, lr=0.01, crop=4, flip=True)
        generator = torch.Generator(self.device).manual_seed(0)
        make = lambda name=None: self.network(name or "resnet-18")  # noqa: E731
        return Context(self.data, recipe, self.device, 0, make, generator, Log(), self.precision, compile_)

    def plain(self, student: str) -> dict[str, Epoch]:
        """Training on labels."""
        return self._loops(student, None, F.cross_entropy, lambda z, x, y: F.cross_entropy(z.float(), y))

    def distillation(self, teacher: str, student: str) -> dict[str, Epoch]:
        """Standard KD with a teacher that is asked about every augmented batch."""
        victim = self.network(teacher, 1)
        ask = inference(victim, self.context())
        return self._loops(
            student, victim, kd_loss(T, ALPHA, labelled=True), lambda z, x, y: kd(z.float(), ask(x), y, T, ALPHA)
        )

    def nasty(self, network: str) -> dict[str, Epoch]:
        """Training of a Nasty Teacher."""
        nasty, victim = Nasty(omega=0.04), self.network(network, 1)
        ask = inference(victim, self.context())
        return self._loops(network, victim, nasty.loss, lambda z, x, y: nasty.loss(z.float(), (ask(x), y)), True)

    def _loops(
        self,
        student: str,
        victim: nn.Module | None,
        loss: Callable[..., Tensor],
        bare_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        nasty: bool = False,
    ) -> dict[str, Epoch]:
        def ours(compile_: bool) -> Epoch:
            model, ctx = self.network(student, 2), self.context(compile_)
            target = (inference(victim, ctx), self.data.y) if victim else self.data.y
            return lambda: fit(model, loss, self.data.x, target, ctx)

        plain = self.network(student, 2).to(memory_format=torch.contiguous_format)
        teacher = channels_first(victim)
        pictures = Pictures(self.pixels, self.labels)
        loops: dict[str, Epoch] = {
            "kdbench": ours(False),
            "bare loop": bare(
                self.network(student, 2), self._in_memory(), bare_loss, self.precision == "bf16", self.device
            ),
            "research loop": ResearchLoop(plain, teacher, pictures, 4, nasty, self.device),
        }
        return loops | ({"kdbench, compiled": ours(True)} if self.compile else {})

    def _in_memory(self) -> Batches:
        ctx = self.context()
        cut = augmented(self.data.x, ctx.recipe, ctx.generator)
        return [
            (cut(index), self.data.y[index]) for index in torch.arange(len(self.data), device=self.device).split(BATCH)
        ]


def channels_first(network: nn.Module | None) -> nn.Module | None:
    """The network as the research loop has it: channels first."""
    return None if network is None else network.to(memory_format=torch.contiguous_format)


def rates(loops: dict[str, Epoch], images: int, rounds: int, device: str) -> dict[str, float]:
    """Images/s of each loop: its best of `rounds` epochs, taken in turns, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, epoch in loops.items():
            with timed(device) as seconds:
                epoch()
            times[name].append(seconds[0])
    return {name: images / min(all_times[1:]) for name, all_times in times.items()}


@contextmanager
def timed(device: str) -> Iterator[list[float]]:
    """Seconds of what is inside, the accelerator's work included."""
    seconds: list[float] = []
    synchronise(device)
    start = time.perf_counter()
    yield seconds
    synchronise(device)
    seconds.append(time.perf_counter() - start)


def synchronise(device: str) -> None:
    """Wait for the accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def cost(training: float, nasty: float, distilling: dict[str, float]) -> float:
    """Minutes of the Nasty Teacher's CIFAR-10 table for a ResNet-18, at so many images/s: both teachers, and each student
    trained alone, from the normal and from the nasty teacher (alone is taken to cost what distilling does)."""
    epochs = TEACHERS / training + TEACHERS / nasty
    epochs += sum(3 * STUDENTS[name] / rate for name, rate in distilling.items())
    return epochs * IMAGES / 60


@click.command()
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), default="cuda")
@click.option("--images", default=IMAGES, show_default=True, help="Images of an epoch.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--network", default="resnet-18", show_default=True, help="The teacher.")
@click.option("--student", "students", multiple=True, default=list(STUDENTS), show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--compiled", is_flag=True, help="Time torch.compile too.")
def main(
    device: str, images: int, rounds: int, network: str, students: tuple[str, ...], precision: Precision, compiled: bool
) -> None:
    """Print a table of images/s, and the cost of the Nasty Teacher's CIFAR-10 table at that speed."""
    bench = Bench(device, images, precision, compiled)
    tasks = {f"training {network}": bench.plain, f"nasty {network}": bench.nasty}
    table = {name: rates(make(network), images, rounds, device) for name, make in tasks.items()}
    table |= {
        f"KD {network} -> {name}": rates(bench.distillation(network, name), images, rounds, device) for name in students
    }
    frame = pd.DataFrame(table).T
    frame["share of the bare loop"] = frame["kdbench"] / frame["bare loop"]
    frame["times the research loop"] = frame["kdbench"] / frame["research loop"]
    where = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {os.cpu_count()} cores"
    print(f"{where}, torch {torch.__version__}, {precision}, batch {BATCH}, {images} images an epoch; images/s")
    print(frame.round(2).to_string())
    for loop in ("kdbench", "research loop"):
        speeds = frame[loop]
        known = {name: speeds[f"KD {network} -> {name}"] for name in students if name in STUDENTS}
        minutes = cost(speeds.iloc[0], speeds.iloc[1], known)
        print(f"{loop}: {minutes:.0f} device minutes for the Nasty Teacher's CIFAR-10 table with {', '.join(known)}")


if __name__ == "__main__":
    main()
