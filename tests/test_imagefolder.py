"""Folders of images as data sets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kdbench import registry
from kdbench.api import Dataset, Images, KdbenchError, Split
from kdbench.engine.sources import source_digest
from kdbench.game.fields import build, plain
from kdbench.records import Status
from kdbench.suites.suite import Suite
from kdbench.zoo.imagefolder import ImageFolder
from runs import ONE_CELL, run

Bytes = NDArray[numpy.uint8]


def images(*shape: int, seed: int = 0) -> Bytes:
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def splits(found: Images) -> list[Split]:
    return [found.train, found.validation, found.test]


def refusal(dataset: Dataset, folder: Path) -> str:
    with pytest.raises(KdbenchError) as caught:
        dataset.load(folder)
    return str(caught.value)


def pairs(x: Any, y: Any) -> set[tuple[bytes, int]]:
    """Images, each with its label."""
    return {(numpy.asarray(image).tobytes(), int(label)) for image, label in zip(x, y, strict=True)}


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
