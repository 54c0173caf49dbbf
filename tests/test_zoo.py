"""Networks and data sets that ship with kdbench."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdbench import registry
from kdbench.api import Images, KdbenchError, Split, seeded
from kdbench.zoo.datasets import Blobs, Digits

NETWORKS = ["mini-8", "mini-16", "mini-32"]


@pytest.fixture(scope="module")
def digits() -> Images:
    return Digits().load(Path())


def splits(images: Images) -> list[Split]:
    return [images.train, images.validation, images.test]


def known(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(image.flatten().tolist()) for image in x}


def network(name: str, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10, seed: int = 0) -> nn.Module:
    with seeded(seed):
        made: nn.Module = registry.load("model", name)(shape, classes)
        return made


# Digits


def test_digits_are_split_into_900_297_and_600(digits: Images) -> None:
    assert [len(split) for split in splits(digits)] == [900, 297, 600]


def test_digits_are_grey_images_between_0_and_1_with_labels(digits: Images) -> None:
    for split in splits(digits):
        assert split.x.shape[1:] == (1, 8, 8)
        assert split.x.dtype == torch.float32
        assert (split.x.min().item(), split.x.max().item()) == (0, 1)
        assert torch.equal(split.x * 16, (split.x * 16).round())
        assert split.y.dtype == torch.int64
        assert split.classes == 10
        assert split.labelled
        assert set(split.y.tolist()) == set(range(10))


def test_digits_have_as_many_images_of_each_class_in_every_split(digits: Images) -> None:
    overall = torch.cat([split.y for split in splits(digits)]).bincount() / 1797
    for split in splits(digits):
        counts = split.y.bincount(minlength=10)
        assert (counts - overall * len(split)).abs().max() <= 1


def test_no_digit_is_in_two_splits(digits: Images) -> None:
    train, validation, test = (known(split.x) for split in splits(digits))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(train | validation | test) == 1797


def test_digits_are_scikit_learns_each_with_its_label(digits: Images) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    label = {tuple((image / 16).tolist()): int(y) for image, y in zip(images, labels, strict=True)}
    for split in splits(digits):
        assert [label[tuple(image.flatten().tolist())] for image in split.x] == split.y.tolist()


def test_digits_are_the_same_each_time_and_others_with_another_seed(digits: Images) -> None:
    again, other = Digits().load(Path()), Digits(seed=1).load(Path())
    for first, second in zip(splits(digits), splits(again), strict=True):
        assert torch.equal(first.x, second.x)
        assert torch.equal(first.y, second.y)
    assert known(digits.test.x) != known(other.test.x)


def test_the_sizes_of_the_splits_can_be_chosen() -> None:
    assert [len(split) for split in splits(Digits(validation=100, test=200).load(Path()))] == [1497, 100, 200]


# Blobs


@pytest.mark.parametrize("count", [3, 96, 100])
def test_blobs_are_made_up_images_of_three_balanced_classes(count: int) -> None:
    for split in splits(Blobs(images=count).load(Path())):
        assert split.x.shape == (count, 1, 8, 8)
        assert split.x.dtype == torch.float32
        assert split.x.min() >= 0
        assert split.x.max() <= 1
        assert split.classes == 3
        counts = split.y.bincount(minlength=3)
        assert counts.max() - counts.min() <= 1


def test_blobs_are_the_same_each_time_and_others_with_another_seed() -> None:
    first, again, other = (Blobs(seed=seed).load(Path()) for seed in (0, 0, 1))
    for one, two, three in zip(splits(first), splits(again), splits(other), strict=True):
        assert torch.equal(one.x, two.x)
        assert not torch.equal(one.x, three.x)


def test_no_blob_is_in_two_splits() -> None:
    train, validation, test = (known(split.x) for split in splits(Blobs().load(Path())))
    assert len(train | validation | test) == 3 * 96


def test_blobs_can_be_told_apart_and_harder_in_more_noise() -> None:
    def accuracy(noise: float) -> float:
        images = Blobs(images=300, noise=noise).load(Path())
        centres = torch.stack([images.train.x[images.train.y == label].mean(dim=0) for label in range(3)])
        nearest = torch.cdist(images.test.x.flatten(1), centres.flatten(1)).argmin(dim=1)
        return float((nearest == images.test.y).float().mean())

    assert accuracy(0.2) > 0.95
    assert accuracy(5.0) < accuracy(0.2)


def test_data_sets_neither_hear_nor_move_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images = [Blobs().load(Path()).train.x, Digits().load(Path()).train.x]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(images[0], Blobs().load(Path()).train.x)
    assert torch.equal(images[1], Digits().load(Path()).train.x)


def test_a_data_set_without_images_is_refused() -> None:
    with pytest.raises(KdbenchError, match=r"^Blobs\.images must be greater than or equal to 1, not 0\.$"):
        Blobs(images=0)


# Networks


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 8), 10), ((3, 8, 8), 3), ((1, 9, 7), 2), ((3, 32, 32), 100)])
def test_a_network_gives_logits_for_images_of_its_shape(name: str, shape: tuple[int, int, int], classes: int) -> None:
    model = network(name, shape, classes)
    for training in (True, False):
        z = model.train(training)(torch.rand(4, *shape))
        assert z.shape == (4, classes)
        assert z.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_seed_gives_the_same_network_and_another_seed_another(name: str) -> None:
    first, again, other = (network(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_networks_come_in_three_sizes() -> None:
    sizes = [sum(parameter.numel() for parameter in network(name).parameters()) for name in NETWORKS]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_is_answered_alike_alone_and_among_others(name: str) -> None:
    model, x = network(name).eval(), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(model(x), torch.cat([model(image) for image in x.split(1)]))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_learns(name: str) -> None:
    model = network(name)
    model(torch.rand(8, 1, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
