"""Published data sets and one's own images: read whole or refused, split by class, and never half downloaded."""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request

import numpy
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import datasets

from kdbench import registry
from kdbench.api import Dataset, Images, KdbenchError, Split
from kdbench.engine.sources import source_digest
from kdbench.game.fields import build, plain
from kdbench.records import Status
from kdbench.suites.suite import Suite
from kdbench.zoo import photos as module
from kdbench.zoo.imagefolder import ImageFolder
from kdbench.zoo.photos import Photos
from kdbench.zoo.splitting import held_out, reduced, shared
from kdbench.zoo.vision import CIFAR10, CIFAR10JPEG, CIFAR100, MNIST, SVHN, FashionMNIST, TinyImageNet, Vision
from runs import ONE_CELL, run

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


def offline(*_: object, **__: object) -> None:
    raise URLError("no network")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", offline)


# Parts


@pytest.mark.parametrize("count", [3, 4, 10, 99, 100, 101])
def test_each_class_has_its_share_of_a_part_to_the_image(count: int) -> None:
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)
    sizes = y.bincount()
    part = shared(y, count, 0, "train")
    assert len(part) == len(set(part.tolist())) == count
    assert part.tolist() == sorted(part.tolist())
    assert (y[part].bincount(minlength=3) - count * sizes / len(y)).abs().max() < 1


def test_a_part_is_the_same_each_time_and_another_with_another_seed() -> None:
    y = torch.arange(100) % 4
    assert torch.equal(shared(y, 40, 0, "train"), shared(y, 40, 0, "train"))
    assert not torch.equal(shared(y, 40, 0, "train"), shared(y, 40, 1, "train"))


def test_a_part_is_drawn_from_all_of_a_class() -> None:
    y = torch.zeros(50, dtype=torch.long)
    drawn = torch.stack([shared(y, 10, seed, "train") for seed in range(40)]).flatten().bincount(minlength=50)
    assert drawn.min() > 0
    assert drawn.max() < 20


def test_a_smaller_part_lies_in_a_larger_one() -> None:
    y = torch.arange(100) % 4
    assert set(shared(y, 20, 3, "train").tolist()) < set(shared(y, 40, 3, "train").tolist())


def test_what_is_held_out_and_what_is_left_make_up_the_whole() -> None:
    data = Split(torch.arange(60).reshape(60, 1, 1, 1), torch.arange(60) % 3, 3)
    rest, part = held_out(data, 12, seed=1)
    assert (len(rest), len(part)) == (48, 12)
    assert sorted(rest.x.flatten().tolist() + part.x.flatten().tolist()) == list(range(60))
    assert all(torch.equal(split.x.flatten() % 3, split.y) for split in (rest, part))


def test_a_part_of_no_size_is_all_there_is() -> None:
    data = Split(torch.rand(6, 1, 1, 1), torch.arange(6) % 3, 3)
    assert reduced(data, 0, 0, "train") is data
    assert torch.equal(reduced(data, 6, 0, "train").x, data.x)


def test_parts_that_cannot_be_are_refused() -> None:
    data = Split(torch.rand(12, 1, 1, 1), torch.arange(12) % 3, 3)
    with pytest.raises(KdbenchError, match=r"^dataset\.train: 2 of 12 images are too few: class 2 would have none\.$"):
        reduced(data, 2, 0, "train")
    with pytest.raises(KdbenchError, match=r"^dataset\.test: there are 12 images, not 13 to choose\.$"):
        reduced(data, 13, 0, "test")
    with pytest.raises(KdbenchError, match=r"^dataset\.validation: 12 images leave none of 12 to train on\.$"):
        held_out(data, 12, seed=0)
    with pytest.raises(
        KdbenchError, match=r"^dataset\.validation: 2 of 12 images are too few: class 2 would have none"
    ):
        held_out(data, 2, seed=0)


# Small fakes in the formats of the originals


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


@dataclass(frozen=True)
class SmallTiny(TinyImageNet):
    sizes = (TRAIN, TEST)
    classes = 4


@dataclass(frozen=True)
class SmallJPEG(CIFAR10JPEG):
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


# Downloads


class Response(io.BytesIO):
    """What a server sends."""

    def __init__(self, url: str, content: bytes) -> None:
        super().__init__(content)
        self.url, self.length, self.headers = url, len(content), HTTPMessage()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files that a server offers, by name: at first a small MNIST, which torchvision knows the checksums of."""
    source = tmp_path / "source"
    mnist(source)
    files = {f"{file.name}.gz": gzip.compress(file.read_bytes()) for file in (source / "MNIST" / "raw").iterdir()}
    shutil.rmtree(source)
    listed = [(name, hashlib.md5(files[name]).hexdigest()) for name, _ in datasets.MNIST.resources]
    monkeypatch.setattr(datasets.MNIST, "resources", listed)

    def urlopen(request: Request, *_: object, **__: object) -> Response:
        name = request.full_url.rpartition("/")[2]
        if name not in files:
            raise URLError("gone")
        return Response(request.full_url, files[name])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return files


def test_what_is_missing_is_downloaded_once_and_nothing_else_is_left(
    server: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = SmallMNIST(validation=20).load(tmp_path / "data")
    left = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.*"))
    left += sorted(path.name for path in (tmp_path / "data" / "MNIST" / "raw").iterdir())
    assert left == sorted(Path(file).name for file in MNIST.files)
    assert not capsys.readouterr().out
    server.clear()
    again = SmallMNIST(validation=20).load(tmp_path / "data")
    assert all(torch.equal(one.x, other.x) for one, other in zip(splits(first), splits(again), strict=True))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_download_that_breaks_leaves_nothing_that_is_taken_for_data(
    server: dict[str, bytes], tmp_path: Path, number: int, damage: str
) -> None:
    name = datasets.MNIST.resources[number][0]
    content = server.pop(name)
    if damage == "short":
        server[name] = content[: len(content) // 2]
    assert "MNIST is missing or damaged" in refusal(SmallMNIST(validation=20), tmp_path)
    assert not list(tmp_path.iterdir())
    server[name] = content
    assert len(SmallMNIST(validation=20).load(tmp_path).test) == TEST


def test_a_damaged_file_is_replaced_by_a_download(server: dict[str, bytes], tmp_path: Path) -> None:
    SmallMNIST(validation=20).load(tmp_path)
    file = tmp_path / MNIST.files[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert len(SmallMNIST(validation=20).load(tmp_path).train) == TRAIN - 20
    assert file.read_bytes() == whole


# Folders of images


def save(file: Path, pixels: Bytes, **options: Any) -> Path:
    """Write pixels (H,W) or (H,W,3)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return file


def folders(root: Path, parts: dict[str, int], shape: tuple[int, ...] = (6, 6, 3), form: str = "png") -> Path:
    """Write a part for each name with so many images in each of the classes ant, bee and cat."""
    for seed, (part, count) in enumerate(parts.items()):
        for label, kind in enumerate(("ant", "bee", "cat")):
            for number, pixels in enumerate(images(count, *shape, seed=10 * seed + label)):
                save(root / part / kind / f"{number}.{form}", pixels)
    return root


def own(path: Path | str, **fields: Any) -> Dataset:
    return build(registry.load("dataset", f"imagefolder:{path}"), fields, "dataset")


def test_ones_own_images_are_read_as_bytes_with_the_classes_of_their_folders(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 10, "test": 4})
    found = own(root).load(Path("nowhere"))
    assert [len(split) for split in splits(found)] == [27, 3, 12]
    for part, read in (("train", [found.train, found.validation]), ("test", [found.test])):
        written = set()
        for label, kind in enumerate(("ant", "bee", "cat")):
            files = (root / part / kind).iterdir()
            written |= {(numpy.asarray(Image.open(file)).transpose(2, 0, 1).tobytes(), label) for file in files}
        assert set().union(*(pairs(split.x, split.y) for split in read)) == written
    for split in splits(found):
        assert (split.x.dtype, split.shape, split.classes) == (torch.uint8, (3, 6, 6), 3)
    assert found.validation.y.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_images_for_validation_may_lie_in_a_folder_of_their_own(tmp_path: Path, name: str) -> None:
    root = folders(tmp_path, {"train": 10, name: 2, "test": 4})
    found = own(root, validation=0.5).load(Path())
    assert [len(split) for split in splits(found)] == [30, 6, 12]
    (root / ("val" if name == "validation" else "validation")).mkdir()
    assert "keep one of these folders" in refusal(own(root), Path())


def test_the_share_held_out_is_a_field_and_its_choice_a_seed(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 10, "test": 1})
    first, again, other = (own(root, validation=0.4, seed=seed).load(Path()).validation for seed in (0, 0, 1))
    assert first.y.bincount().tolist() == [4, 4, 4]
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert "leave none of 30 to train on" in refusal(own(root, validation=1.0), Path())


def test_images_become_grey_or_rgb_whatever_they_are(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 4, "test": 1})
    pixels = images(6, 6)
    for kind in ("ant", "bee", "cat"):
        save(root / "test" / kind / "0.png", pixels)
    colour, grey = (own(root, channels=channels).load(Path()) for channels in (3, 1))
    assert colour.test.x.eq(torch.from_numpy(pixels)).all()
    assert colour.test.x.shape[1:] == (3, 6, 6)
    assert grey.test.x.eq(torch.from_numpy(pixels)).all()
    assert grey.train.x.shape[1:] == (1, 6, 6)
    assert refusal_of_fields(channels=2).startswith("dataset.channels must be 1 or 3")
    assert refusal_of_fields(size=100_000) == "dataset.size must be less than or equal to 1024, not 100000."


def refusal_of_fields(**fields: Any) -> str:
    with pytest.raises(KdbenchError) as caught:
        own("anywhere", **fields)
    return str(caught.value)


def test_images_of_many_sizes_are_scaled_when_asked(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 4, "test": 1})
    wide = numpy.zeros((8, 16, 3), dtype=numpy.uint8)
    wide[:, 4:12] = 200  # the middle square
    odd = save(root / "train" / "bee" / "9.png", wide)
    first = root / "train" / "ant" / "0.png"
    said = f"The images are not all of one size: {first} is 6x6 pixels, {odd} is 8x16 pixels. The field size scales"
    assert refusal(own(root), Path()).startswith(said)
    found = own(root, size=4, validation=0.1).load(Path())
    assert found.train.shape == (3, 4, 4)
    middle = torch.cat([split.x[split.y == 1] for split in (found.train, found.validation)])
    # Scaled smoothly: the edges have something of what was cut off, and would be black had it been kept.
    assert sum(bool((x[:, :, 1:3] == 200).all() and (x > 150).all()) for x in middle) == 1


def test_splits_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folders(tmp_path, {"train": 2})
    folders(tmp_path, {"test": 2}, shape=(5, 7, 3))
    said = refusal(own(tmp_path), Path())
    train, test = tmp_path / "train", tmp_path / "test"
    assert said.startswith(f"The images in {test} are 5x7 pixels, those in {train} are 6x6 pixels.")


def test_folders_that_are_not_as_they_should_be_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    assert refusal(own(root), Path()) == (
        f"There is no folder {root / 'train'}. The images of 'imagefolder:{root}' are {root}/train/CLASS/*.png "
        f"and {root}/test/CLASS/*.png."
    )
    folders(root, {"train": 2})
    assert refusal(own(root), Path()).startswith(f"There is no folder {root / 'test'}.")
    folders(root, {"test": 2})
    (root / "test" / "cat").rename(root / "test" / "dog")
    assert refusal(own(root), Path()) == (
        f"The images of all splits must have the same classes: {root / 'test'} lacks cat; {root / 'train'} lacks dog."
    )
    (root / "test" / "dog").rename(root / "test" / "cat")
    (root / "train" / "eel").mkdir()
    (root / "test" / "eel").mkdir()
    said = refusal(own(root), Path())
    assert said.startswith(f"{root / 'train'} holds no images in folders, one for each class: ")
    assert "eel" in said


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 2, "test": 2})
    for part in ("train", "test"):
        for kind in ("ant", "cat"):
            shutil.rmtree(root / part / kind)
    said = f"{root / 'train'} holds one class, bee; to tell apart there must be two or more."
    assert refusal(own(root), Path()) == said
    with pytest.raises(KdbenchError, match=r"holds one class, bee"):
        own(root).fingerprint(Path())


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 3, "test": 2}, form="jpg")
    file = root / "train" / "bee" / "1.jpg"
    whole = file.read_bytes()
    for content in (b"no image", whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert refusal(own(root), Path()).startswith(f"{file} is no whole image: ")


def test_a_file_with_a_damaged_header_is_named(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 3, "test": 2})
    png = root / "train" / "bee" / "1.png"
    whole = png.read_bytes()
    png.write_bytes(whole.replace(b"\0\0\0\x0dIHDR", b"\0\0\0\x04IHDR"))  # the first chunk is said to end early
    assert refusal(own(root), Path()).startswith(f"{png} is no whole image: ")
    png.unlink()
    ppm = root / "train" / "bee" / "1.ppm"
    ppm.write_bytes(b"P6\n6 x 255\n" + bytes(108))
    assert refusal(own(root), Path()).startswith(f"{ppm} is no whole image: ")


@pytest.mark.parametrize(("kind", "mode"), [("uint16", "I;16"), ("int32", "I"), ("float32", "F")])
def test_an_image_of_more_than_8_bits_is_refused_before_it_is_cut_off(tmp_path: Path, kind: str, mode: str) -> None:
    root = folders(tmp_path, {"train": 3, "test": 2})
    file = root / "train" / "bee" / "1.tiff"
    Image.fromarray((256 * images(6, 6).astype(numpy.int64)).astype(kind)).save(file)
    said = f"{file} has pixels of mode {mode}, not of 8 bits a channel: convert it first."
    assert refusal(own(root), Path()) == said


def test_a_link_to_nowhere_is_named_by_whoever_meets_it_first(tmp_path: Path) -> None:
    root = folders(tmp_path, {"train": 3, "test": 2})
    link = root / "train" / "bee" / "7.png"
    link.symlink_to(tmp_path / "gone.png")
    with pytest.raises(KdbenchError, match=rf"^{link} cannot be read: No such file or directory\.$"):
        own(root).fingerprint(Path())
    assert refusal(own(root), Path()).startswith(f"{link} is no whole image: ")


def test_a_bare_imagefolder_asks_for_a_path(tmp_path: Path) -> None:
    for ask in (ImageFolder().load, ImageFolder().fingerprint):
        with pytest.raises(KdbenchError, match=r"needs an argument: imagefolder:PATH\.$"):
            ask(tmp_path)


def test_the_path_is_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path / "mine", {"train": 3, "test": 2})
    monkeypatch.chdir(tmp_path)
    assert len(own("mine").load(Path("elsewhere")).test) == 6


def test_a_named_folder_is_a_value_like_any_data_set(tmp_path: Path) -> None:
    cls = registry.load("dataset", "imagefolder:mine")
    assert build(cls, json.loads(json.dumps(plain(cls(size=8)))), "dataset") == cls(size=8)
    assert cls(size=8) != registry.load("dataset", "imagefolder:other")(size=8)
    assert registry.load("dataset", "imagefolder:mine") is cls
    assert source_digest(cls) == source_digest(ImageFolder)


CHANGES: dict[str, Callable[[Path], object]] = {
    "another image": lambda root: save(root / "test" / "ant" / "0.png", images(6, 6, 3, seed=99)),
    "one image more": lambda root: save(root / "train" / "ant" / "8.png", images(6, 6, 3)),
    "one image less": lambda root: (root / "train" / "cat" / "1.png").unlink(),
    "another name": lambda root: (root / "train" / "cat" / "1.png").rename(root / "train" / "cat" / "8.png"),
    "another class": lambda root: (root / "train" / "cat" / "0.png").rename(root / "train" / "bee" / "8.png"),
    "another split": lambda root: (root / "train" / "cat" / "2.png").rename(root / "test" / "cat" / "2.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_changes_with_the_images(tmp_path: Path, change: str) -> None:
    root = folders(tmp_path, {"train": 3, "test": 2})
    before = own(root).fingerprint(Path())
    CHANGES[change](root)
    assert own(root).fingerprint(Path()) != before


def test_a_fingerprint_stays_when_nothing_changes_that_is_read(tmp_path: Path) -> None:
    root = folders(tmp_path / "one", {"train": 3, "test": 2})
    before = own(root).fingerprint(Path())
    (root / "notes.txt").write_text("mine")
    (root / "train" / "ant" / "notes.txt").write_text("mine")
    (root / "train" / "ant" / "0.png").touch()
    assert own(root).fingerprint(Path()) == before
    shutil.copytree(root, tmp_path / "two")
    assert own(tmp_path / "two").fingerprint(Path()) == before


@pytest.mark.parametrize("name", ["digits", "blobs", "photos", "mnist", "cifar10-jpeg"])
def test_what_is_the_same_everywhere_has_no_fingerprint(name: str, tmp_path: Path) -> None:
    assert registry.load("dataset", name)().fingerprint(tmp_path) == ""


def test_a_suite_runs_on_ones_own_images_and_anew_when_one_of_them_changes(
    tiny: Callable[..., Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path / "mine", {"train": 12, "test": 6}, shape=(8, 8, 3))
    monkeypatch.chdir(tmp_path)
    suite = tiny({**ONE_CELL, "dataset": {"name": "imagefolder:mine", "channels": 1}})
    [cell] = run(suite, tmp_path).values()
    assert (cell.status, cell.reason, cell.dataset, cell.classes) == (Status.DONE, "", "imagefolder:mine", 3)
    save(tmp_path / "mine" / "test" / "ant" / "0.png", images(8, 8, 3, seed=99))
    [changed] = run(suite, tmp_path).values()
    assert changed.status == Status.DONE
    assert changed.dataset_digest != cell.dataset_digest


# CIFAR-10 as JPEG, and Tiny ImageNet


def jpegs(root: Path, parts: dict[str, int], side: int = 32) -> None:
    for seed, (part, count) in enumerate(parts.items()):
        for label in range(10):
            for number, pixels in enumerate(images(count // 10, side, side, 3, seed=10 * seed + label)):
                save(root / "cifar10-jpeg" / part / f"class{label}" / f"{number:04}.jpg", pixels)


def test_cifar10_as_jpeg_is_read_out_of_its_folders(tmp_path: Path) -> None:
    jpegs(tmp_path, {"train": TRAIN, "test": TEST})
    found = SmallJPEG(validation=20).load(tmp_path)
    assert [len(split) for split in splits(found)] == [40, 20, 20]
    assert found.train.shape == (3, 32, 32)
    written = Image.open(tmp_path / "cifar10-jpeg" / "test" / "class3" / "0001.jpg")
    assert torch.equal(found.test.x[7], torch.from_numpy(numpy.array(written)).permute(2, 0, 1))
    assert found.test.y.tolist() == [label for label in range(10) for _ in range(2)]


def test_cifar10_as_jpeg_is_refused_unless_it_is_whole(tmp_path: Path) -> None:
    assert refusal(CIFAR10JPEG(), tmp_path) == (
        f"CIFAR-10 as JPEG is not here and cannot be downloaded: expected {tmp_path}/cifar10-jpeg/train, "
        f"{tmp_path}/cifar10-jpeg/test; --data-dir chooses another folder."
    )
    jpegs(tmp_path, {"train": TRAIN, "test": TEST})
    assert "has 60 images of 10 classes, not 50,000 images of 10 classes" in refusal(CIFAR10JPEG(), tmp_path)
    shutil.rmtree(tmp_path / "cifar10-jpeg" / "test")
    jpegs(tmp_path, {"test": TEST}, side=16)
    said = "The images of CIFAR-10 as JPEG are 32x32 pixels, not 16x16 pixels."
    assert refusal(SmallJPEG(validation=20), tmp_path) == said


WNIDS = ("n01443537", "n01629819", "n01641577", "n02099601")


def tiny_imagenet(folder: Path, side: int = 64) -> Path:
    """Write a small one, laid out as the official archive, one grey file in it; its root."""
    root = folder / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\t0\t0\t1\t1\n")
        for number, pixels in enumerate(images(TRAIN // 4, side, side, 3, seed=label)):
            save(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", pixels)
    save(root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG", images(side, side))
    for number, pixels in enumerate(images(TEST, side, side, 3, seed=9)):
        save(root / "val" / "images" / f"val_{number}.JPEG", pixels)
    rows = [f"val_{number}.JPEG\t{WNIDS[number % 4]}\t0\t32\t44\t62\n" for number in range(TEST)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


def test_tiny_imagenet_is_read_out_of_the_official_folder_its_test_sorted_by_class(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path)
    found = SmallTiny(validation=20).load(tmp_path)
    assert [len(split) for split in splits(found)] == [40, 20, 20]
    assert found.train.shape == (3, 64, 64)
    assert found.train.y.bincount().tolist() == [10] * 4
    assert found.test.y.tolist() == [label for label in range(4) for _ in range(5)]
    files = [root / "val" / "images" / f"val_{number}.JPEG" for number in range(TEST)]
    written = [torch.from_numpy(numpy.array(Image.open(file))).permute(2, 0, 1) for file in files]
    wanted = pairs([image.contiguous() for image in written], [number % 4 for number in range(TEST)])
    assert pairs(found.test.x, found.test.y) == wanted
    grey = [image for split in (found.train, found.validation) for image in split.x if image[0].equal(image[1])]
    assert len(grey) == 1


def test_tiny_imagenet_is_refused_unless_it_is_whole(tmp_path: Path) -> None:
    said = refusal(TinyImageNet(), tmp_path)
    for place in ("train", "val/images", "val/val_annotations.txt"):
        assert f"{tmp_path}/tiny-imagenet-200/{place}" in said
    root = tiny_imagenet(tmp_path)
    assert "has 60 images of 4 classes, not 100,000 images of 200 classes" in refusal(TinyImageNet(), tmp_path)
    table = root / "val" / "val_annotations.txt"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(rows[:-1]))
    assert "has 19 images of 4 classes, not 20 images" in refusal(SmallTiny(validation=20), tmp_path)
    table.write_text("".join([*rows[:2], "val_2.JPEG\tn99999999\t0\t0\t1\t1\n"]))
    assert refusal(SmallTiny(), tmp_path).startswith(f"{table}, line 3: 'val_2.JPEG\tn99999999")
    table.write_text("".join(rows))
    (root / "val" / "images" / "val_3.JPEG").unlink()
    assert refusal(SmallTiny(), tmp_path).startswith(f"{root}/val/images/val_3.JPEG is no whole image: ")


# Photos


@pytest.fixture(scope="module")
def photos() -> Images:
    return Photos(images=400).load(Path())


def test_photos_are_small_pieces_of_two_photographs(photos: Images) -> None:
    assert [len(split) for split in splits(photos)] == [400, 200, 200]
    for split in splits(photos):
        assert (split.x.dtype, split.shape, split.classes) == (torch.uint8, (3, 32, 32), 2)
        assert split.y.bincount().tolist() == [len(split) // 2] * 2
        assert len(pairs(split.x, split.y)) == len(split)


def test_a_piece_is_found_in_its_photograph_again_as_it_is_or_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_sample_images

    monkeypatch.setattr(module, "SMALLEST", 32)
    monkeypatch.setattr(module, "LARGEST", 32)  # nothing to scale
    large, train = load_sample_images().images, Photos(images=40).load(Path()).train
    ways = [
        [way for way, piece in (("as it is", x), ("mirrored", x.flip(2))) if contains(large[label], piece)]
        for x, label in zip(train.x, train.y.tolist(), strict=True)
    ]
    assert all(ways)
    assert {way for found in ways for way in found} == {"as it is", "mirrored"}


def contains(photograph: Bytes, piece: Tensor) -> bool:
    pixels = piece.permute(1, 2, 0).numpy()
    corners = numpy.argwhere((photograph[:-31, :-31] == pixels[0, 0]).all(axis=2)).tolist()
    return any((photograph[top : top + 32, left : left + 32] == pixels).all() for top, left in corners)


def test_a_scaled_piece_is_as_light_as_its_square() -> None:
    shade = [Image.fromarray(numpy.full((427, 640, 3), value, dtype=numpy.uint8)) for value in (40, 200)]
    split = module._pieces(shade, 10, torch.Generator().manual_seed(0))
    assert all(bool((x == (40, 200)[label]).all()) for x, label in zip(split.x, split.y.tolist(), strict=True))


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999999])
def test_pieces_lie_in_their_photograph_whatever_their_side(place: float) -> None:
    sheets = [Image.new("RGB", (640, 427)), Image.new("RGB", (500, 300))]
    y, side = torch.tensor([0, 1, 1, 0]), torch.tensor([24, 256, 100, 256])
    boxes = list(module._boxes(sheets, y, side, torch.full((2, 4), place)))
    for (left, top, right, bottom), label, length in zip(boxes, y.tolist(), side.tolist(), strict=True):
        assert (right - left, bottom - top) == (length, length)
        assert min(left, top) >= 0
        assert right <= sheets[label].width
        assert bottom <= sheets[label].height
    ends = [(right, bottom) for _, _, right, bottom in boxes]
    assert (ends == [sheets[label].size for label in y.tolist()]) == (place > 0.9)


def test_photos_are_the_same_each_time_and_others_with_another_seed(photos: Images) -> None:
    again, other = (Photos(images=400, seed=seed).load(Path()) for seed in (0, 1))
    for one, same, different in zip(*map(splits, (photos, again, other)), strict=True):
        assert torch.equal(one.x, same.x)
        assert not torch.equal(one.x, different.x)


def test_more_photos_are_evaluated_on_the_same(photos: Images) -> None:
    more = Photos(images=600).load(Path())
    assert len(more.train) == 600
    assert torch.equal(more.test.x, photos.test.x)
    assert torch.equal(more.validation.x, photos.validation.x)


def test_photos_neither_hear_nor_move_the_global_generator(photos: Images) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(Photos(images=400).load(Path()).train.x, photos.train.x)
    assert torch.equal(torch.get_rng_state(), before)
