"""Image files as bytes in one tensor, and folders with a folder of them for each class."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kdbench.api import KdbenchError, Split

MODES = {1: "L", 3: "RGB"}
DEEP = ("I", "F")  # how Pillow's modes begin that have more than 8 bits a channel: I, I;16, I;16B, F
Pixels = NDArray[numpy.uint8]


def classes_of(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted: the classes, in the order of their labels."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def in_folders(folder: Path) -> tuple[list[Path], Tensor]:
    """The image files below the folders in `folder`, class by class, and their labels (N,).

    Raises `KdbenchError` when there are no folders, or no image in one of them.
    """
    from torchvision.datasets import ImageFolder

    try:
        samples = ImageFolder(folder).samples
    except FileNotFoundError as error:
        raise KdbenchError(f"{folder} holds no images in folders, one for each class: {error}") from None
    return [Path(path) for path, _ in samples], torch.tensor([label for _, label in samples])


def read_folders(folder: Path, channels: int, size: int = 0, remedy: str = "") -> Split:
    """The images below the folders in `folder`, as `decoded` has them, with their classes."""
    paths, y = in_folders(folder)
    return Split(decoded(paths, channels, size, remedy), y, len(classes_of(folder)))


def decoded(paths: Sequence[Path], channels: int, size: int = 0, remedy: str = "") -> Tensor:
    """The images at `paths` as bytes (N,C,H,W), grey (C = 1) or RGB (3), whatever they are in the files.

    size: height and width to scale them to, what is too long cut off on both sides; 0 leaves them as they are. Raises
    `KdbenchError` with the path for a file that is no whole image or has more than 8 bits a channel, and for an image
    whose size is not that of the first; remedy: what to do then.
    """
    first = _decode(paths[0], channels, size)
    x = numpy.empty((len(paths), *first.shape), dtype=numpy.uint8)
    for index, path in enumerate(paths):
        image = _decode(path, channels, size)
        if image.shape != first.shape:
            sizes = f"{paths[0]} is {pixels(first.shape)}, {path} is {pixels(image.shape)}"
            raise KdbenchError(f"The images are not all of one size: {sizes}.{remedy}")
        x[index] = image
    return torch.from_numpy(x)


def pixels(shape: tuple[int, ...]) -> str:
    """The size of an image of `shape` (C,H,W) in words."""
    _, height, width = shape
    return f"{height}x{width} pixels"


def _decode(path: Path, channels: int, size: int) -> Pixels:
    """One image (C,H,W)."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith(DEEP):
                # Pillow would cut off what is above 255, and which value is white nothing tells: 12 bits lie in 16 too.
                raise KdbenchError(f"{path} has pixels of mode {file.mode}, not of 8 bits a channel: convert it first.")
            image: Image.Image = file.convert(MODES[channels])
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise KdbenchError(f"{path} is no whole image: {error}.") from None
    if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = numpy.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)
