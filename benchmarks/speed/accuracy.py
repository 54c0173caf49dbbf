"""Whether speed costs accuracy: the same distillation by kdbench in fp32 and bf16 and by the usual research loop.

python benchmarks/speed/accuracy.py FOLDER --out accuracy.csv

FOLDER holds train/<class>/* and test/<class>/* of 32x32 images. One teacher (PreResNet-20), and for each seed the plain
CNN distilled from it by each engine: same images, first weights, epochs, batch, optimiser, rates, crops and flips. The
last epoch counts. Accuracies are compared by seed. Students that are in the file already are not trained again.
"""

from pathlib import Path

import click
import pandas as pd
import torch
import torch.nn.functional as F
from loops import ALPHA, Pictures, ResearchLoop, T
from scipy.stats import t as student_t
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from kdbench import registry
from kdbench.api import Context, Log, Precision, Recipe, Split, fit, inference, predict_logits, seeded
from kdbench.attacks.kd import kd_loss
from kdbench.engine.models import Standardise
from kdbench.training.loop import rate

TEACHER, STUDENT = "preresnet-20", "cnn"
ENGINES: dict[str, Precision | None] = {"kdbench fp32": "fp32", "kdbench bf16": "bf16", "research loop": None}


def pixels(folder: Path, images: int) -> tuple[Tensor, Tensor]:
    """The first images of each class, as many of each: bytes (N,3,32,32) and labels (N,)."""
    found = ImageFolder(str(folder))
    each = images // len(found.classes)
    labels = torch.tensor(found.targets)
    chosen = torch.cat([(labels == k).nonzero().flatten()[:each] for k in range(len(found.classes))])
    return torch.stack([pil_to_tensor(found[int(i)][0]) for i in chosen]), labels[chosen]


def split(x: Tensor, y: Tensor) -> Split:
    """Images in [0,1]."""
    return Split(x, y, int(y.max()) + 1).to("cpu")


class Comparison:
    """One teacher, and students of it."""

    def __init__(self, folder: Path, images: int, epochs: int, teacher_epochs: int) -> None:
        self.x, self.y = pixels(folder / "train", images)
        self.train, self.test = split(self.x, self.y), split(*pixels(folder / "test", 10_000))
        self.recipe = Recipe(epochs=epochs, batch=128, lr=0.05, schedule="cosine", crop=4, flip=True)
        self.teacher = self.network(TEACHER, 1000)
        ctx = self.context(1000, "bf16", epochs=teacher_epochs, lr=0.1)
        fit(self.teacher, F.cross_entropy, self.train.x, self.train.y, ctx)

    def network(self, name: str, seed: int) -> nn.Module:
        """A network that standardises, with first weights by the seed."""
        std, mean = torch.std_mean(self.train.x, dim=(0, 2, 3))
        with seeded(seed):
            return nn.Sequential(Standardise(mean, std), registry.load("model", name)((3, 32, 32), self.train.classes))

    def context(self, seed: int, precision: Precision, **changes: float) -> Context:
        """A context with this recipe."""
        draws = torch.Generator().manual_seed(seed)
        make = lambda name=None: self.network(name or STUDENT, seed)  # noqa: E731
        ctx = Context(self.train, self.recipe, "cpu", seed, make, draws, Log(), precision)
        return ctx.training(**changes)

    def accuracy(self, engine: str, seed: int) -> float:
        """Share of the test images that a student trained by this engine gets right."""
        student = self.network(STUDENT, seed)
        precision = ENGINES[engine]
        if precision:
            ctx = self.context(seed, precision)
            loss = kd_loss(T, ALPHA, labelled=True)
            fit(student, loss, self.train.x, (inference(self.teacher, ctx), self.train.y), ctx)
        else:
            self.research(student, seed)
        hits = predict_logits(student, self.test.x).argmax(1) == self.test.y
        return float(hits.float().mean())

    def research(self, student: nn.Module, seed: int) -> None:
        """Train as the research loop does, at the recipe's rates."""
        pictures = Pictures(self.x, self.y, normalised=False)  # these networks standardise by themselves
        loop = ResearchLoop(student, self.teacher, pictures, workers=0)
        steps = -(-len(self.y) // self.recipe.batch)
        loop.rates = [rate(self.recipe, step / steps) for step in range(steps * self.recipe.epochs)]
        with seeded(seed):
            for _ in range(self.recipe.epochs):
                loop()


def interval(values: pd.Series) -> str:
    """Mean and half the width of the 95 % t interval, in per cent."""
    half_width = student_t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return f"{100 * values.mean():.2f} +- {100 * half_width:.2f}"


def report(table: pd.DataFrame) -> list[str]:
    """Accuracies, and differences from the research loop by seed."""
    wide = table.pivot(index="seed", columns="engine", values="accuracy")
    lines = [f"{engine}: {interval(wide[engine])} %, n = {len(wide)}" for engine in wide]
    research = wide["research loop"]
    return lines + [
        f"{engine} - research loop: {interval(wide[engine] - research)} points"
        for engine in wide
        if engine != "research loop"
    ]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=Path("accuracy.csv"), show_default=True)
@click.option("--images", default=5000, show_default=True, help="Training images, balanced by class.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--teacher-epochs", default=20, show_default=True)
@click.option("--seeds", default=5, show_default=True)
def main(folder: Path, out: Path, images: int, epochs: int, teacher_epochs: int, seeds: int) -> None:
    """Train what is missing, then say how the engines compare."""
    comparison = Comparison(folder, images, epochs, teacher_epochs)
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    done = {(row["engine"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for engine in ENGINES:
            if (engine, seed) not in done:
                rows.append({"engine": engine, "seed": seed, "accuracy": comparison.accuracy(engine, seed)})
                pd.DataFrame(rows).to_csv(out, index=False)
                print(rows[-1], flush=True)
    print("\n".join(report(pd.DataFrame(rows))))


if __name__ == "__main__":
    main()
