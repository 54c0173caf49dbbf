"""One's own images, in folders named after their classes."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Le

from kdbench.api import Dataset, Fraction, Images, KdbenchError, Whole

from .decoding import classes_of, in_folders, pixels, read_folders
from .splitting import held_out

VALIDATION = ("validation", "val")
Side = Annotated[int, Ge(0), Le(1024)]  # whatever the files are, all of them must fit into memory in that size


@dataclass(frozen=True)
class ImageFolder(Dataset):
    """imagefolder:PATH is your own images: PATH/train/CLASS/*.png (or .jpg, ...) and PATH/test/CLASS/*.png.

    PATH is relative to the current folder. Images for validation lie in PATH/validation or PATH/val; where there is
    none of these, the share `validation` of the training images is held out, drawn by `seed`, each class in its share.
    There are two classes or more. size: height and width to scale all images to, after what is too long is cut off on
    both sides; 0 is their own, which must be one for all. channels: 3 makes all of them RGB, 1 grey.
    """

    size: Side = 0
    channels: Literal[1, 3] = 3
    validation: Fraction = 0.1
    seed: Whole = 0

    argument: ClassVar[str] = "PATH"
    path: ClassVar[Path | None] = None

    @classmethod
    @cache
    def from_argument(cls, argument: str) -> type[Self]:
        """The data set of the images in the folder `argument`."""
        own = {"path": Path(argument).expanduser(), "__module__": cls.__module__, "__doc__": cls.__doc__}
        return type(cls.__name__, (cls,), own)

    def load(self, folder: Path) -> Images:
        """The images; `folder` has no part in it."""
        folders = self._folders()
        splits = {name: read_folders(place, self.channels, self.size, REMEDY) for name, place in folders.items()}
        train, test = splits["train"], splits["test"]
        for name, split in splits.items():
            if split.shape != train.shape:
                sizes = f"{pixels(split.shape)}, those in {folders['train']} are {pixels(train.shape)}"
                raise KdbenchError(f"The images in {folders[name]} are {sizes}.{REMEDY}")
        if "validation" in splits:
            return Images(train, splits["validation"], test)
        count = max(train.classes, round(self.validation * len(train)))
        rest, part = held_out(train, count, self.seed)
        return Images(rest, part, test)

    def fingerprint(self, folder: Path) -> str:
        """A digest of the images' names and of what is in their files: who changes one has other data.

        Raises `KdbenchError` for a file that cannot be read.
        """
        sha = hashlib.sha256()
        try:
            for name, place in self._folders().items():
                for path in in_folders(place)[0]:
                    sha.update(f"{name}/{path.relative_to(place).as_posix()}\0{path.stat().st_size}\0".encode())
                    sha.update(path.read_bytes())
        except OSError as error:  # a link to nowhere, a file or folder of somebody else
            raise KdbenchError(f"{error.filename} cannot be read: {error.strerror}.") from None
        return sha.hexdigest()[:16]

    def _folders(self) -> dict[str, Path]:
        """Where the images of each split lie; they are there, and have the same classes."""
        root = self.path
        if root is None:
            raise KdbenchError("The dataset 'imagefolder' needs an argument: imagefolder:PATH.")
        folders = {"train": root / "train", "test": root / "test"}
        match [root / name for name in VALIDATION if (root / name).is_dir()]:
            case [place]:
                folders["validation"] = place
            case [one, other]:
                raise KdbenchError(f"There are both {one} and {other}: keep one of these folders.")
        for place in folders.values():
            if not place.is_dir():
                layout = f"{root}/train/CLASS/*.png and {root}/test/CLASS/*.png"
                raise KdbenchError(f"There is no folder {place}. The images of 'imagefolder:{root}' are {layout}.")
            _same_classes(folders["train"], place)
        if len(names := classes_of(folders["train"])) == 1:
            raise KdbenchError(
                f"{folders['train']} holds one class, {names[0]}; to tell apart there must be two or more."
            )
        return folders


REMEDY = " The field size scales all of them."


def _same_classes(train: Path, other: Path) -> None:
    here, there = set(classes_of(train)), set(classes_of(other))
    if here != there:
        lacks = [f"{other} lacks {', '.join(sorted(here - there))}"] if here - there else []
        lacks += [f"{train} lacks {', '.join(sorted(there - here))}"] if there - here else []
        raise KdbenchError(f"The images of all splits must have the same classes: {'; '.join(lacks)}.")
