"""Augmentation: random crops after zero padding, random flips, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from tiny_training import trained
from torch import Tensor

from helpers import blobs, context
from kdbench.api import Recipe
from kdbench.training.augmentation import augmented


def shifts(image: Tensor, pad: int) -> dict[tuple[int, int], Tensor]:
    """All crops of one image (C,H,W) after zero padding, by their corner."""
    _, height, width = image.shape
    wide = F.pad(image, (pad, pad, pad, pad))
    span = range(2 * pad + 1)
    return {(top, left): wide[:, top : top + height, left : left + width] for top in span for left in span}


@pytest.fixture
def images() -> Tensor:
    """The same image 600 times, no two pixels alike and none 0; two channels, higher than wide."""
    return torch.arange(1.0, 61.0).reshape(1, 2, 6, 5).expand(600, -1, -1, -1) / 60


@pytest.mark.parametrize("pad", [1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs(images: Tensor, pad: int, flip: bool) -> None:
    x = augmented(images, Recipe(crop=pad, flip=flip), torch.Generator().manual_seed(0))(torch.arange(len(images)))
    assert x.shape == images.shape
    allowed = {(corner, False): window for corner, window in shifts(images[0], pad).items()}
    if flip:
        allowed |= {(corner, True): window.flip(2) for (corner, _), window in allowed.items()}
    found = [[key for key, window in allowed.items() if torch.equal(image, window)] for image in x]
    assert all(len(keys) == 1 for keys in found)
    assert {keys[0] for keys in found} == allowed.keys()


def test_a_flip_is_left_to_right_for_about_half_of_the_images(images: Tensor) -> None:
    x = augmented(images, Recipe(flip=True), torch.Generator().manual_seed(0))(torch.arange(len(images)))
    flipped = (x == images.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(x[~flipped], images[~flipped])
    assert 240 < int(flipped.sum()) < 360


def test_without_crop_and_flip_images_stay_as_they_are_and_nothing_is_drawn(images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(augmented(images, Recipe(crop=0, flip=False), generator)(torch.arange(len(images))), images)
    assert torch.equal(generator.get_state(), before)


def test_augmentation_does_not_change_the_data() -> None:
    data = blobs().train
    before = data.x.clone()
    trained(data, context(data).training(crop=2, flip=True))
    assert torch.equal(data.x, before)
