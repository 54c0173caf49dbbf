"""Data sets: splits are read when asked for; a data subset is balanced and drawn from its seed alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import blobs
from kdbench.api import UNKNOWN, DataSubset, Images, KdbenchError, Split

# Data subsets


def split(sizes: list[int]) -> Split:
    """Images each of another grey, labels mixed; `sizes` images a class."""
    y = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    x = torch.linspace(0, 1, len(y))[:, None, None, None].expand(-1, 1, 2, 2)
    return Split(x, y, len(sizes))


SIZES = st.lists(st.integers(10, 40), min_size=1, max_size=5)


@given(sizes=SIZES, fraction=st.floats(0.1, 1.0), seed=st.integers(0, 5))
def test_a_data_subset_is_that_fraction_of_every_class_in_the_original_order(
    sizes: list[int], fraction: float, seed: int
) -> None:
    data = split(sizes)
    part = DataSubset(fraction, seed).of(data)
    assert [int((part.y == label).sum()) for label in range(len(sizes))] == [round(fraction * size) for size in sizes]
    grey = part.x[:, 0, 0, 0]
    assert (grey.diff() > 0).all()
    index = torch.searchsorted(data.x[:, 0, 0, 0].contiguous(), grey.contiguous())
    assert torch.equal(data.y[index], part.y)
    assert torch.equal(data.x[index], part.x)


def test_the_same_seed_gives_the_same_images_and_another_seed_others() -> None:
    data = split([40, 40])
    assert torch.equal(DataSubset(0.5, 3).of(data).x, DataSubset(0.5, 3).of(data).x)
    assert not torch.equal(DataSubset(0.5, 3).of(data).x, DataSubset(0.5, 4).of(data).x)


def test_fraction_1_is_the_data_itself_and_fraction_0_is_no_image() -> None:
    data = split([10, 12])
    assert DataSubset(1.0).of(data) is data
    nothing = DataSubset(0.0).of(data)
    assert len(nothing) == 0
    assert nothing.shape == data.shape
    assert nothing.classes == data.classes
    assert nothing.labelled


def test_a_fraction_too_small_for_a_class_is_refused_by_its_label() -> None:
    with pytest.raises(KdbenchError, match=r"^a fraction of 0\.1 leaves no image of class 1 \(3 in all\)$"):
        DataSubset(0.1).of(split([30, 3]))


def test_a_class_without_images_is_left_empty() -> None:
    data = split([10, 10])
    assert len(DataSubset(0.5).of(Split(data.x, data.y, classes=3))) == 10


@pytest.mark.parametrize("fraction", [-0.1, 1.1, torch.nan])
def test_a_fraction_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(KdbenchError, match=r"^DataSubset\.fraction must be "):
        DataSubset(fraction)


def test_a_data_subset_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    DataSubset(0.5, 3).of(split([40, 40]))
    assert torch.equal(torch.get_rng_state(), before)


# Splits


def test_images_without_labels_keep_all_but_their_labels() -> None:
    data = blobs().train
    bare = data.without_labels()
    assert data.labelled
    assert not bare.labelled
    assert (bare.y == UNKNOWN).all()
    assert bare.y.dtype == data.y.dtype
    assert torch.equal(bare.x, data.x)
    assert (data.y != UNKNOWN).all()


def test_bytes_become_grey_levels_between_0_and_1() -> None:
    data = Split(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.zeros(3).long(), 1)
    x = data.to("cpu").x
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_floats_stay_as_they_are_in_single_precision(dtype: torch.dtype) -> None:
    x = Split(torch.tensor([0.25, 1.0], dtype=dtype).reshape(2, 1, 1, 1), torch.zeros(2).long(), 1).to("cpu").x
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == [0.25, 1.0]


def test_taking_images_takes_their_labels_along() -> None:
    data = blobs().train
    index = torch.tensor([5, 0, 5])
    part = data.take(index)
    assert torch.equal(part.x, data.x[index])
    assert torch.equal(part.y, data.y[index])
    assert (len(part), part.shape) == (3, (1, 8, 8))


# Data sets


def test_a_lazy_data_set_reads_a_split_once_and_only_when_asked_for() -> None:
    read: list[str] = []

    def load(name: str) -> Split:
        read.append(name)
        return split([len(read)])

    images = Images.lazy(load)
    assert read == []
    assert images.test is images.test
    assert read == ["test"]
    assert [len(part) for part in (images.validation, images.train, images.test)] == [2, 3, 1]
    assert read == ["test", "validation", "train"]


def test_the_splits_of_a_data_set_are_the_ones_it_was_made_of() -> None:
    train, validation, test = split([1]), split([2]), split([3])
    images = Images(train, validation, test)
    assert (images.train, images.validation, images.test) == (train, validation, test)
