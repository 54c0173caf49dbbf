"""CIFAR-10 as JPEG files, Tiny ImageNet, and photos."""

import hashlib
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdbench.api import Dataset, Images, KdbenchError, Split
from kdbench.zoo import photos as module
from kdbench.zoo.photos import Photos
from kdbench.zoo.vision import CIFAR10JPEG, TinyImageNet


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
class SmallTiny(TinyImageNet):
    sizes = (TRAIN, TEST)
    classes = 4


@dataclass(frozen=True)
class SmallJPEG(CIFAR10JPEG):
    sizes = (TRAIN, TEST)


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


def pairs(x: Any, y: Any) -> set[tuple[bytes, int]]:
    """Images, each with its label."""
    return {(numpy.asarray(image).tobytes(), int(label)) for image, label in zip(x, y, strict=True)}


def save(file: Path, pixels: Bytes, **options: Any) -> Path:
    """Write pixels (H,W) or (H,W,3)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return file


def jpegs(root: Path, parts: dict[str, int], side: int = 32) -> None:
    for seed, (part, count) in enumerate(parts.items()):
        for label in range(10):
            for number, pixels in enumerate(images(count // 10, side, side, 3, seed=10 * seed + label)):
                save(root / "cifar10-jpeg" / part / f"class{label}" / f"{number:04}.jpg", pixels)


# CIFAR-10 as JPEG, and Tiny ImageNet


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


@pytest.fixture(scope="module")
def photos() -> Images:
    return Photos(images=400).load(Path())


# Photos


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
