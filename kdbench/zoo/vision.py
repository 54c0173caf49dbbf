"""The data sets of the field: read where torchvision keeps them, downloaded when they are not there and can be."""

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from kdbench.api import Count, Dataset, Images, KdbenchError, Split, Whole

from .decoding import classes_of, decoded, pixels, read_folders
from .splitting import held_out, reduced

# What torchvision raises at files that are absent, damaged, or shorter than they say they are.
UNREADABLE = (RuntimeError, ValueError, AssertionError, IndexError, EOFError)
UNREACHABLE = (OSError, HTTPException, RuntimeError, EOFError)
SILENCE_SECONDS = 30.0  # of a server, before it is given up: some networks swallow what they do not let out


@dataclass(frozen=True)
class Vision(Dataset):
    """A published data set with a training and a test part, of sizes that are checked.

    validation: images held out of the training part, each class in its share, drawn by `seed`. train, test: so many of
    what is left and of the test part, drawn likewise, for small budgets; 0 is all of them.
    """

    validation: Count = 5000
    seed: Whole = 0
    train: Whole = 0
    test: Whole = 0

    title: ClassVar[str]
    sizes: ClassVar[tuple[int, int]]
    classes: ClassVar[int]

    def load(self, folder: Path) -> Images:
        """The images as bytes; raises `KdbenchError` with the expected paths when they are not there."""
        train, test = self.read(folder)
        for part, split, size in (("training", train, self.sizes[0]), ("test", test, self.sizes[1])):
            if len(split) != size or not 0 <= split.y.min() <= split.y.max() < self.classes:
                found = f"{len(split):,} images of {len(split.y.unique())} classes"
                whole = f"{size:,} images of {self.classes} classes"
                raise KdbenchError(f"The {part} part of {self.title} in {folder} has {found}, not {whole}.")
        rest, validation = held_out(train, self.validation, self.seed)
        train, test = reduced(rest, self.train, self.seed, "train"), reduced(test, self.test, self.seed, "test")
        return Images(train, validation, test)

    def read(self, folder: Path) -> tuple[Split, Split]:
        """All images of the training and of the test part."""
        raise NotImplementedError


@dataclass(frozen=True)
class Downloaded(Vision):
    """A data set that torchvision reads and, where there is a network, downloads. files: its own, below the folder."""

    files: ClassVar[tuple[str, ...]]

    def read(self, folder: Path) -> tuple[Split, Split]:
        """Both parts, downloaded unless they are there."""
        with contextlib.suppress(*UNREADABLE):
            return self._parts(folder, False)
        try:
            return self._download(folder)
        except UNREACHABLE as error:
            raise KdbenchError(
                f"{self.title} is missing or damaged in {folder}, and cannot be downloaded ({_reason(error)}). "
                f"Expected: {', '.join(str(folder / file) for file in self.files)}; --data-dir chooses another folder."
            ) from None

    def _download(self, folder: Path) -> tuple[Split, Split]:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside its place, and moved file by file when all of it is whole: what is interrupted is not taken for data.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as name, _patience():
            with contextlib.redirect_stdout(sys.stderr):
                parts = self._parts(Path(name), True)
            for file in self.files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(name) / file, folder / file)
        return parts

    def _parts(self, folder: Path, download: bool) -> tuple[Split, Split]:
        train, test = (self._part(folder, training, download) for training in (True, False))
        return train, test

    def _part(self, folder: Path, training: bool, download: bool) -> Split:
        """One part; raises one of `UNREADABLE` when it is not there, or of `UNREACHABLE`."""
        raise NotImplementedError

    def _split(self, x: Any, y: Any) -> Split:
        """A split of images (N,C,H,W) and labels, tensors or arrays."""
        images = torch.from_numpy(numpy.ascontiguousarray(x))
        return Split(images, torch.as_tensor(y, dtype=torch.int64), self.classes)


# Files of MNIST, and of what is made like it.
IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True)
class MNIST(Downloaded):
    """MNIST: 60,000 + 10,000 handwritten digits, 1x28x28 (LeCun et al. 1998)."""

    title = "MNIST"
    sizes = (60_000, 10_000)
    classes = 10
    files = tuple(f"MNIST/raw/{name}" for name in IDX)

    def _part(self, folder: Path, training: bool, download: bool) -> Split:
        from torchvision import datasets

        part = datasets.MNIST(folder, training, download=download)
        return self._split(part.data[:, None], part.targets)


@dataclass(frozen=True)
class FashionMNIST(Downloaded):
    """Fashion-MNIST: 60,000 + 10,000 pictures of clothes of ten kinds, 1x28x28 (Xiao et al. 2017)."""

    title = "Fashion-MNIST"
    sizes = (60_000, 10_000)
    classes = 10
    files = tuple(f"FashionMNIST/raw/{name}" for name in IDX)

    def _part(self, folder: Path, training: bool, download: bool) -> Split:
        from torchvision import datasets

        part = datasets.FashionMNIST(folder, training, download=download)
        return self._split(part.data[:, None], part.targets)


@dataclass(frozen=True)
class CIFAR10(Downloaded):
    """CIFAR-10: 50,000 + 10,000 small photographs of ten kinds of things, 3x32x32 (Krizhevsky 2009)."""

    title = "CIFAR-10"
    sizes = (50_000, 10_000)
    classes = 10
    files = tuple(
        f"cifar-10-batches-py/{name}"
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
    )

    def _part(self, folder: Path, training: bool, download: bool) -> Split:
        from torchvision import datasets

        part = datasets.CIFAR10(folder, training, download=download)
        return self._split(part.data.transpose(0, 3, 1, 2), part.targets)


@dataclass(frozen=True)
class CIFAR100(Downloaded):
    """CIFAR-100: 50,000 + 10,000 small photographs of a hundred kinds of things, 3x32x32 (Krizhevsky 2009)."""

    title = "CIFAR-100"
    sizes = (50_000, 10_000)
    classes = 100
    files = tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta"))

    def _part(self, folder: Path, training: bool, download: bool) -> Split:
        from torchvision import datasets

        part = datasets.CIFAR100(folder, training, download=download)
        return self._split(part.data.transpose(0, 3, 1, 2), part.targets)


@dataclass(frozen=True)
class SVHN(Downloaded):
    """SVHN: 73,257 + 26,032 digits of house numbers, 3x32x32 (Netzer et al. 2011). Its `extra` part is not used."""

    title = "SVHN"
    sizes = (73_257, 26_032)
    classes = 10
    files = ("train_32x32.mat", "test_32x32.mat")

    def _part(self, folder: Path, training: bool, download: bool) -> Split:
        from torchvision import datasets

        part = datasets.SVHN(folder, "train" if training else "test", download=download)
        return self._split(part.data, part.labels)


@dataclass(frozen=True)
class TinyImageNet(Vision):
    """Tiny ImageNet: 100,000 + 10,000 photographs of 200 kinds of things, 3x64x64 (Stanford's CS231N, 2015).

    Reads the official folder tiny-imagenet-200. Its test part has no labels: its validation part is the test here,
    sorted by class, and `validation` images are held out of the training part. Grey files become RGB.
    """

    validation: Count = 10_000

    title = "Tiny ImageNet"
    sizes = (100_000, 10_000)
    classes = 200

    def read(self, folder: Path) -> tuple[Split, Split]:
        """Both parts, decoded."""
        root = folder / "tiny-imagenet-200"
        train, test = root / "train", root / "val" / "images"
        labels = root / "val" / "val_annotations.txt"
        _expect(self.title, train, test, labels)
        names = classes_of(train)
        found = sorted((names.index(kind), name) for name, kind in _annotations(labels, names))
        x = decoded([test / name for _, name in found], channels=3)
        y = torch.tensor([label for label, _ in found])
        return _sized(self.title, 64, read_folders(train, channels=3), Split(x, y, len(names)))


def _annotations(file: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """The file name and the class of each image: the first two columns of `file`."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        columns = line.split("\t")
        if len(columns) < 2 or columns[1] not in names:
            raise KdbenchError(f"{file}, line {number}: '{line}' does not name an image and one of the classes.")
        yield columns[0], columns[1]


@dataclass(frozen=True)
class CIFAR10JPEG(Vision):
    """The images of CIFAR-10 after lossy compression: JPEG files in cifar10-jpeg/{train,test}/CLASS, 3x32x32.

    Not CIFAR-10: accuracies on it are not to be set beside those on CIFAR-10.
    """

    variant_of: ClassVar[str] = "cifar10"

    title = "CIFAR-10 as JPEG"
    sizes = (50_000, 10_000)
    classes = 10

    def read(self, folder: Path) -> tuple[Split, Split]:
        """Both parts, decoded."""
        train, test = (folder / "cifar10-jpeg" / part for part in ("train", "test"))
        _expect(self.title, train, test)
        return _sized(self.title, 32, read_folders(train, channels=3), read_folders(test, channels=3))


def _expect(title: str, *paths: Path) -> None:
    if missing := [str(path) for path in paths if not path.exists()]:
        raise KdbenchError(
            f"{title} is not here and cannot be downloaded: expected {', '.join(missing)}; "
            "--data-dir chooses another folder."
        )


def _sized(title: str, side: int, train: Split, test: Split) -> tuple[Split, Split]:
    for split in (train, test):
        if split.shape[1:] != (side, side):
            raise KdbenchError(f"The images of {title} are {side}x{side} pixels, not {pixels(split.shape)}.")
    return train, test


def _reason(error: BaseException) -> str:
    """The last line of what went wrong: torchvision lists all mirrors that it tried."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Inside, a connection that is silent for too long is an error."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
