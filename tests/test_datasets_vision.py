"""Data sets of torchvision, read from small made-up files in the formats of the originals."""

import hashlib
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy
import pytest
import torch
from numpy.typing import NDArray
from torchvision import datasets

from kdbench.api import Dataset, Images, KdbenchError, Split
from kdbench.zoo.vision import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, Vision


def offline(*_: object, **__: object) -> None:
    raise URLError("no network")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", offline)


Bytes = NDArray[numpy.uint8]


TRAIN, TEST = 60, 20  # images of the fakes


def images(*shape: int, seed: int = 0) -> Bytes:
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def labels(count: int, classes: int = 10, seed: int = 0) -> NDArray[numpy.int64]:
    return numpy.random.default_rng(seed).permutation(numpy.arange(count) % classes)


def splits(found: Images) -> list[Split]:
    return [found.train, found.validation, found.test]


def refusal(dataset: Dataset, folder: Path) -> str:
    with pytest.raises(KdbenchError) as caught:
        dataset.load(folder)
    return str(caught.value)


@dataclass(frozen=True)
class SmallMNIST(MNIST):
    sizes = (TRAIN, TEST)


@dataclass(frozen=True)
class SmallFashion(FashionMNIST):
    sizes = (TRAIN, TEST)


@dataclass(frozen=True)
class SmallCIFAR10(CIFAR10):
    sizes = (TRAIN, TEST)


@dataclass(frozen=True)
class SmallCIFAR100(CIFAR100):
    sizes = (200, 100)


@dataclass(frozen=True)
class SmallSVHN(SVHN):
    sizes = (TRAIN, TEST)


def idx(array: NDArray[Any]) -> bytes:
    """`array` of bytes in the format of MNIST's files."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(numpy.uint8).tobytes()


def idx_files(x: Bytes, y: NDArray[Any], part: str) -> dict[str, bytes]:
    return {f"{part}-images-idx3-ubyte": idx(x), f"{part}-labels-idx1-ubyte": idx(y)}


def mnist(folder: Path, name: str = "MNIST") -> tuple[Bytes, NDArray[Any], Bytes, NDArray[Any]]:
    """Write both parts; training images and labels, and those of the test."""
    data = images(TRAIN, 28, 28), labels(TRAIN), images(TEST, 28, 28, seed=1), labels(TEST, seed=1)
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for file, content in (idx_files(*data[:2], "train") | idx_files(*data[2:], "t10k")).items():
        (raw / file).write_bytes(content)
    return data[0][:, None], data[1], data[2][:, None], data[3]


def pickled(file: Path, content: dict[str, Any]) -> list[str]:
    """Write `content`; its name and checksum, as torchvision lists them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))
    return [file.name, hashlib.md5(file.read_bytes()).hexdigest()]


Data = tuple[Bytes, NDArray[Any], Bytes, NDArray[Any]]


def cifar(folder: Path, cls: Any, count: tuple[int, int], classes: int, patch: pytest.MonkeyPatch) -> Data:
    """Write the batches of a data set of torchvision and let it know their checksums."""
    key, names = ("fine_labels", "fine_label_names") if classes == 100 else ("labels", "label_names")
    base = folder / cls.base_folder
    train, test = ((images(n, 3, 32, 32, seed=n), labels(n, classes, seed=n)) for n in count)
    batches = numpy.array_split(numpy.arange(count[0]), len(cls.train_list))
    listed = [
        pickled(base / name, {"data": train[0][part].reshape(len(part), -1), key: train[1][part].tolist()})
        for part, (name, _) in zip(batches, cls.train_list, strict=True)
    ]
    last = pickled(base / cls.test_list[0][0], {"data": test[0].reshape(len(test[0]), -1), key: test[1].tolist()})
    meta = pickled(base / cls.meta["filename"], {names: [str(label) for label in range(classes)]})
    patch.setattr(cls, "train_list", listed)
    patch.setattr(cls, "test_list", [last])
    patch.setattr(cls, "meta", {"filename": meta[0], "key": names, "md5": meta[1]})
    return *train, *test


def svhn(folder: Path, patch: pytest.MonkeyPatch) -> Data:
    from scipy.io import savemat

    data = images(TRAIN, 3, 32, 32), labels(TRAIN), images(TEST, 3, 32, 32, seed=1), labels(TEST, seed=1)
    listed = {}
    for part, x, y in (("train", *data[:2]), ("test", *data[2:])):
        file = folder / f"{part}_32x32.mat"
        savemat(file, {"X": x.transpose(2, 3, 1, 0), "y": numpy.where(y == 0, 10, y)[:, None]})
        listed[part] = [f"http://localhost/{file.name}", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    patch.setattr(datasets.SVHN, "split_list", listed)
    return data


@dataclass(frozen=True)
class Fake:
    """A small data set in the format of the original, and what was written."""

    dataset: type[Vision]
    folder: Path
    data: Data


FAKES = ["mnist", "fashion", "cifar10", "cifar100", "svhn"]


@pytest.fixture
def fake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    match request.param:
        case "mnist":
            return Fake(SmallMNIST, tmp_path, mnist(tmp_path))
        case "fashion":
            return Fake(SmallFashion, tmp_path, mnist(tmp_path, "FashionMNIST"))
        case "cifar10":
            data = cifar(tmp_path, datasets.CIFAR10, (TRAIN, TEST), 10, monkeypatch)
            return Fake(SmallCIFAR10, tmp_path, data)
        case "cifar100":
            data = cifar(tmp_path, datasets.CIFAR100, (200, 100), 100, monkeypatch)
            return Fake(SmallCIFAR100, tmp_path, data)
        case _:
            return Fake(SmallSVHN, tmp_path, svhn(tmp_path, monkeypatch))


def pairs(x: Any, y: Any) -> set[tuple[bytes, int]]:
    """Images, each with its label."""
    return {(numpy.asarray(image).tobytes(), int(label)) for image, label in zip(x, y, strict=True)}


@pytest.mark.parametrize("fake", FAKES, indirect=True)
def test_a_data_set_is_what_lies_in_its_files_each_image_with_its_label(fake: Fake) -> None:
    held = 100 if fake.dataset is SmallCIFAR100 else 20
    found = fake.dataset(validation=held).load(fake.folder)
    x, y, x_test, y_test = fake.data
    assert [len(split) for split in splits(found)] == [len(x) - held, held, len(x_test)]
    for split in splits(found):
        assert (split.x.dtype, split.y.dtype, split.classes) == (torch.uint8, torch.int64, fake.dataset.classes)
        assert split.x.shape[1:] == x.shape[1:]
        assert split.x.is_contiguous()
        counts = split.y.bincount(minlength=split.classes)
        assert counts.max() == counts.min()
    assert pairs(found.train.x, found.train.y) | pairs(found.validation.x, found.validation.y) == pairs(x, y)
    assert pairs(found.test.x, found.test.y) == pairs(x_test, y_test)


@pytest.mark.parametrize("fake", ["mnist"], indirect=True)
def test_smaller_parts_are_chosen_by_class_and_seed(fake: Fake) -> None:
    whole = fake.dataset(validation=20).load(fake.folder)
    small, again, other = (
        fake.dataset(validation=20, train=20, test=10, seed=seed).load(fake.folder) for seed in (0, 0, 1)
    )
    assert [len(split) for split in splits(small)] == [20, 20, 10]
    for one, same, different, all_ in zip(*map(splits, (small, again, other, whole)), strict=True):
        assert torch.equal(one.x, same.x)
        assert not torch.equal(one.x, different.x)
        assert pairs(one.x, one.y) <= pairs(all_.x, all_.y)
        assert set(one.y.bincount().tolist()) == {len(one) // 10}
    assert torch.equal(small.validation.x, whole.validation.x)


@pytest.mark.parametrize("fake", ["mnist"], indirect=True)
def test_a_data_set_neither_hears_nor_moves_the_global_generator(fake: Fake) -> None:
    before = torch.get_rng_state()
    first = fake.dataset(validation=20).load(fake.folder)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(first.train.x, fake.dataset(validation=20).load(fake.folder).train.x)


@pytest.mark.parametrize("fake", ["mnist"], indirect=True)
def test_a_published_data_set_of_another_size_is_refused(fake: Fake) -> None:
    assert refusal(MNIST(), fake.folder) == (
        f"The training part of MNIST in {fake.folder} has 60 images of 10 classes, not 60,000 images of 10 classes."
    )


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN])
def test_what_is_missing_and_cannot_be_had_is_one_sentence_with_the_paths(
    cls: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(cls(), tmp_path / "data")
    assert said.startswith(f"{cls.title} is missing or damaged in {tmp_path / 'data'}, and cannot be downloaded (")
    assert "no network" in said
    assert all(str(tmp_path / "data" / file) in said for file in cls.files)
    assert "\n" not in said
    assert not list((tmp_path / "data").iterdir())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("fake", FAKES, indirect=True)
@pytest.mark.parametrize("damage", ["absent", "short"])
def test_a_data_set_of_which_a_file_is_not_whole_is_refused(fake: Fake, damage: str) -> None:
    files: tuple[str, ...] = fake.dataset.files  # type: ignore[attr-defined]
    for name in files:
        file = fake.folder / name
        content = file.read_bytes()
        file.unlink() if damage == "absent" else file.write_bytes(content[: len(content) // 2])
        assert " is missing or damaged in " in refusal(fake.dataset(validation=20), fake.folder)
        file.write_bytes(content)
    assert fake.dataset(validation=20 if fake.dataset.classes == 10 else 100).load(fake.folder)
