"""Images and labels as whole tensors, and what part of them a player owns."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.game.fields import Checked, Share, Whole

UNKNOWN = -1
"""The label of an image whose label its owner does not know."""


@dataclass(frozen=True)
class Split:
    """Images `x` (N,C,H,W), float in [0,1], with labels `y` (N,) int64 below `classes`, `UNKNOWN` where not owned."""

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
        """The same images, their labels forgotten."""
        return replace(self, y=torch.full_like(self.y, UNKNOWN))

    def to(self, device: str) -> "Split":
        """The same on `device`, images as float32 in [0,1] (bytes are divided by 255)."""
        x = self.x.to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return replace(self, x=x, y=self.y.to(device))


@dataclass(frozen=True)
class Images:
    """A whole data set. Only `train` reaches a player; `validation` and `test` are the referee's."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Dataset(Checked):
    """Subclass = frozen dataclass; its fields choose the version of the data.

    images_of: the registered data set of which it holds the images in another form, "" where there is none; a thief who is
    to own no image of a game draws on neither of the two.
    """

    variant_of: ClassVar[str] = ""

    def load(self, folder: Path) -> Images:
        """Read the data; `folder` is where files of data sets lie. Images may be bytes or floats in [0,1].

        Raises `KdbenchError` with the expected paths when files are missing.
        """
        raise NotImplementedError

    def fingerprint(self, folder: Path) -> str:
        """What tells other files from these where the fields do not: for data sets that are not the same for everybody."""
        return ""


def fitted(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (N,C,H,W) in [0,1] in another `shape` (C,H,W): resized without aliasing, colours to luminance or grey to RGB.

    Raises `KdbenchError` for a number of channels that is neither 1 nor 3 and not that of the images.
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
    """Which part of the training data a thief uses: a class-balanced `fraction` drawn with `seed`; 0 is data-free."""

    fraction: Share = 1.0
    seed: Whole = 0

    def of(self, data: Split) -> Split:
        """That part of `data`, in the original order.

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
