"""How data sets are split: balanced, disjoint and reproducible parts."""

import numpy
import pytest
import torch
from numpy.typing import NDArray

from kdbench.api import KdbenchError, Split
from kdbench.zoo.splitting import held_out, reduced, shared

Bytes = NDArray[numpy.uint8]


def images(*shape: int, seed: int = 0) -> Bytes:
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


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
