"""What kdbench is timed against: a bare loop over the same modules, and the usual research loop, restated faithfully.

The research loop is that of the Nasty Teacher's repository and of many like it. PIL images go through a DataLoader with random
crops, flips and normalisation, channels first, in fp32. The teacher's forward pass is in eval mode without gradient, and loss and
accuracy are read back every step. Nothing in it is slowed down.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdbench.api import kd

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
T, ALPHA = 4.0, 0.9

Batches = Sequence[tuple[Tensor, Tensor]]


def bare(
    student: nn.Module,
    batches: Batches,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    bf16: bool,
    device: str = "cpu",
) -> Callable[[], None]:
    """An epoch of forward, backward and optimiser step on batches already in memory, and nothing else.

    loss: (logits, images, labels) -> scalar; a teacher's forward pass is part of it. The optimiser is the fused one.
    """
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)

    def epoch() -> None:
        student.train()
        for x, y in batches:
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                z = student(x)
                value = loss(z, x, y)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()

    return epoch


class Pictures(Dataset[tuple[Tensor, int]]):
    """PIL images with the usual transforms, as torchvision's CIFAR gives them."""

    def __init__(self, images: Tensor, labels: Tensor, *, normalised: bool = True) -> None:
        self._images = images.permute(0, 2, 3, 1).numpy()  # uint8 (N,H,W,C)
        self._labels = labels.tolist()
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self._transform = transforms.Compose([*steps, *([transforms.Normalize(MEAN, STD)] if normalised else [])])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


@dataclass
class ResearchLoop:
    """The usual loop of a KD repository, an epoch a call; `workers` of its DataLoader; `rates` of its steps to come."""

    student: nn.Module
    teacher: nn.Module | None
    pictures: Pictures
    workers: int
    nasty: bool = False
    device: str = "cpu"
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.SGD(self.student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        # Its workers live on: starting them would weigh more on the short epochs of a benchmark than on real ones.
        self._loader = DataLoader(
            self.pictures,
            128,
            shuffle=True,
            num_workers=self.workers,
            pin_memory=self.device == "cuda",
            persistent_workers=self.workers > 0,
        )

    def __call__(self) -> None:
        self.student.train()
        if self.teacher:
            self.teacher.eval()
        losses, hits = 0.0, 0.0
        for x, y in self._loader:
            x, y = x.to(self.device), y.to(self.device)  # noqa: PLW2901  # as these loops have it
            z = self.student(x)
            loss = self._loss(z, x, y)
            if self.rates:
                self._optimizer.param_groups[0]["lr"] = self.rates.pop(0)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            losses += loss.item()
            hits += (z.detach().argmax(1) == y).float().mean().item()

    def _loss(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if not self.teacher:
            return F.cross_entropy(z, y)
        with torch.no_grad():
            answers = self.teacher(x)
        if self.nasty:
            log_q = F.log_softmax(answers / T, dim=1)
            return F.cross_entropy(z, y) - 0.04 * T**2 * F.kl_div(log_q, F.softmax(z / T, dim=1), reduction="batchmean")
        return kd(z, answers, y, T, ALPHA)
