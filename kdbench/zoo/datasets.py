"""Data sets that need no download: scikit-learn's digits, and blobs for tests."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdbench.api import Count, Dataset, Images, Positive, Split, Whole


@dataclass(frozen=True)
class Digits(Dataset):
    """Scikit-learn's digits: 1,797 handwritten digits of 43 people, 1x8x8, 17 grey levels (UCI, Alpaydin & Kaynak 1998).

    Split by a fixed seed, class-balanced: `test` and `validation` images, the rest is for training.
    """

    validation: Count = 297
    test: Count = 600
    seed: Whole = 0

    def load(self, folder: Path) -> Images:
        from sklearn.datasets import load_digits  # half a second, needed nowhere else
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        split = {"random_state": self.seed}
        x, x_test, y, y_test = train_test_split(images, labels, test_size=self.test, stratify=labels, **split)
        x, x_val, y, y_val = train_test_split(x, y, test_size=self.validation, stratify=y, **split)
        return Images(*(_digits(*part) for part in ((x, y), (x_val, y_val), (x_test, y_test))))


def _digits(images: object, labels: object) -> Split:
    x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return Split(x, torch.as_tensor(labels, dtype=torch.int64), 10)


@dataclass(frozen=True)
class Blobs(Dataset):
    """Made-up images of three classes, 1x8x8: a class is a smooth pattern, an image is its pattern in noise. For tests."""

    images: Count = 96
    noise: Positive = 0.2
    seed: Whole = 0

    def load(self, folder: Path) -> Images:
        generator = torch.Generator().manual_seed(self.seed)
        patterns = torch.rand(3, 1, 4, 4, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return Images(*(self._split(patterns, generator) for _ in range(3)))

    def _split(self, patterns: Tensor, generator: torch.Generator) -> Split:
        y = torch.arange(self.images) % 3
        x = patterns[y] + self.noise * torch.randn(self.images, 1, 8, 8, generator=generator)
        return Split(x.clamp(0, 1), y, 3)
