"""Natural images that need no download: pieces of the two photographs that ship with scikit-learn."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from kdbench.api import Count, Dataset, Images, Split, Whole

SIDE = 32
SMALLEST, LARGEST = 24, 256  # side of a piece in the photographs, which are 427 x 640
Box = tuple[int, int, int, int]
HELD_OUT = 200  # images for validation, and for the test


@dataclass(frozen=True)
class Photos(Dataset):
    """Pieces of two photographs, a temple and a flower, 3x32x32: natural images to query a victim with.

    A piece is a square of random place and side, from 24 to 256 pixels, scaled to 32x32 and mirrored at random; its
    class is the photograph. Pieces overlap, between splits too: what is learnt from them says little about anything.
    """

    images: Count = 20_000
    seed: Whole = 0

    def load(self, folder: Path) -> Images:
        """The pieces as bytes; `folder` has no part in it."""
        from sklearn.datasets import load_sample_images  # half a second, needed nowhere else

        photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        generator = torch.Generator().manual_seed(self.seed)
        # In this order: the number of training images changes none of the others.
        validation, test, train = (
            _pieces(photographs, count, generator) for count in (HELD_OUT, HELD_OUT, self.images)
        )
        return Images(train, validation, test)


def _pieces(photographs: list[Image.Image], count: int, generator: torch.Generator) -> Split:
    """`count` pieces, of each photograph in turn."""
    y = torch.arange(count) % len(photographs)
    side = torch.randint(SMALLEST, LARGEST + 1, (count,), generator=generator)
    place = torch.rand(2, count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    x = numpy.empty((count, 3, SIDE, SIDE), dtype=numpy.uint8)
    for index, (label, box) in enumerate(zip(y.tolist(), _boxes(photographs, y, side, place), strict=True)):
        piece = photographs[label].resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)  # antialiased
        x[index] = numpy.asarray(piece).transpose(2, 0, 1)
    pieces = torch.from_numpy(x)
    return Split(torch.where(mirrored[:, None, None, None], pieces.flip(3), pieces), y, len(photographs))


def _boxes(photographs: list[Image.Image], y: Tensor, side: Tensor, place: Tensor) -> Iterator[Box]:
    """(left, top, right, bottom) of each piece: `place` (2,N) in [0,1) chooses among all corners it may have."""
    size = torch.tensor([photograph.size for photograph in photographs])[y].T
    corners = (place * (size - side + 1)).long()
    for (left, top), length in zip(corners.T.tolist(), side.tolist(), strict=True):
        yield left, top, left + length, top + length
