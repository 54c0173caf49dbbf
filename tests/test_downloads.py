"""Data sets that are downloaded: asked of torchvision, checked, and never half read."""

import gzip
import hashlib
import io
import shutil
import struct
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
from torchvision import datasets

from kdbench.api import Dataset, Images, KdbenchError, Split
from kdbench.zoo.vision import MNIST


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
