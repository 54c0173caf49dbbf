"""Images and labels as whole tensors, and the subset of them that an attacker has."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.game.fields import Checked, Share, Whole

UNKNOWN = -1
"""The label of an image whose class is not known to whoever holds it."""


@dataclass(frozen=True)
class Split:
    """Images `x` (N,C,H,W), float in [0,1], with labels `y` (N,) int64 below `classes`, or `UNKNOWN`."""

    x: Tensor
    y: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C,H,W) of one image."""
        _, channels, height, width = self.x.shape
        return channels, height, width

    @property
    def labelled(self) -> bool:
        """Whether every label is known."""
        return bool((self.y != UNKNOWN).all())

    def take(self, index: Tensor) -> "Split":
        """The images at `index` (M,)."""
        return replace(self, x=self.x[index], y=self.y[index])

    def without_labels(self) -> "Split":
        """The same images, every label `UNKNOWN`."""
        return replace(self, y=torch.full_like(self.y, UNKNOWN))

    def to(self, device: str) -> "Split":
        """The same on `device`, images as float32 in [0,1] (bytes are divided by 255)."""
        x = self.x.to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return replace(self, x=x, y=self.y.to(device))


class Images:
    """A data set in three splits. Defenses and attacks get `train` alone; `validation` and `test` are for evaluation."""

    def __init__(self, train: Split, validation: Split, test: Split) -> None:
        splits = {"train": train, "validation": validation, "test": test}
        self._load: Callable[[str], Split] = splits.__getitem__

    @classmethod
    def lazy(cls, load: Callable[[str], Split]) -> "Images":
        """The data set whose splits `load` reads by name; each is read once, when it is first asked for."""
        images = cls.__new__(cls)
        images._load = load
        return images

    @cached_property
    def train(self) -> Split:
        """The images that victims are trained on, and of which attackers have a subset."""
        return self._load("train")

    @cached_property
    def validation(self) -> Split:
        """The images on which the strongest attack is chosen."""
        return self._load("validation")

    @cached_property
    def test(self) -> Split:
        """The images on which results are measured."""
        return self._load("test")


@dataclass(frozen=True)
class Dataset(Checked):
    """Subclass = frozen dataclass; its fields choose the version of the data."""

    variant_of: ClassVar[str] = ""
    """The registered data set whose images this one holds in another form; "" where there is none.

    Neither of the two is surrogate data for a victim trained on the other: their images are the same.
    """

    def load(self, folder: Path) -> Images:
        """Read the data; `folder` holds the files of data sets. Images may be uint8 or floats in [0,1].

        Raises `KdbenchError` with the expected paths when files are missing.
        """
        raise NotImplementedError

    def fingerprint(self, folder: Path) -> str:
        """A digest of the files in `folder`, for data sets whose fields do not decide the images; "" for all others."""
        return ""


def resized(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (N,C,H,W) in [0,1] as images of another `shape` (C,H,W).

    Resizing is bilinear with antialiasing. Colour images become their luminance, grey images three equal channels.
    Raises `KdbenchError` when the number of channels changes otherwise than between 1 and 3.
    """
    channels, height, width = shape
    if x.shape[1] != channels:
        if {x.shape[1], channels} != {1, 3}:
            raise KdbenchError(f"images of {x.shape[1]} channels cannot be made to have {channels}; 1 and 3 can.")
        luminance = torch.tensor([0.299, 0.587, 0.114], device=x.device).reshape(1, 3, 1, 1)
        x = (x * luminance).sum(1, keepdim=True) if channels == 1 else x.expand(-1, 3, -1, -1)
    if x.shape[2:] != (height, width):
        x = nn.functional.interpolate(x, (height, width), mode="bilinear", antialias=True)
    return x.clamp(0, 1).contiguous()


@dataclass(frozen=True)
class DataSubset(Checked):
    """A class-balanced `fraction` of the attacker's images, drawn with `seed`; fraction 0 is a data-free attack."""

    fraction: Share = 1.0
    seed: Whole = 0

    def of(self, data: Split) -> Split:
        """The subset of `data`, in the original order.

        Raises `KdbenchError` when the fraction is so small that some class would have no image.
        """
        if self.fraction == 1:
            return data
        if self.fraction == 0:
            return data.take(torch.empty(0, dtype=torch.long, device=data.x.device))
        generator = torch.Generator().manual_seed(self.seed)
        chosen = [self._of_class(data, label, generator) for label in range(data.classes)]
        return data.take(torch.cat(chosen).sort().values.to(data.x.device))

    def _of_class(self, data: Split, label: int, generator: torch.Generator) -> Tensor:
        members = (data.y.cpu() == label).nonzero().flatten()
        count = round(self.fraction * len(members))
        if len(members) and not count:
            raise KdbenchError(
                f"a fraction of {self.fraction} leaves no image of class {label} ({len(members)} in all)"
            )
        return members[torch.randperm(len(members), generator=generator)[:count]]
