"""Gaussian noise: its law, and that asking again gains nothing."""

import pytest
import torch
from torch import Tensor, nn

from helpers import context, generator, near
from kdbench.api import (
    Defense,
    Split,
)
from kdbench.defenses.gaussian_noise import GaussianNoise, noise, renormalised


def rows(classes: int, count: int = 64, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, classes, generator=generator(5))


def served(defense: Defense, z: Tensor, seed: int = 0) -> Tensor:
    """The answers (N,K) of a model whose logits are `z`: an "image" is its logits."""
    only_classes_matter = Split(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), z.shape[1])
    return defense.serve(nn.Flatten(), context(only_classes_matter, seed=seed))(z[:, :, None, None])


def test_noise_is_standard_normal_and_independent_across_images_and_classes() -> None:
    x = torch.rand(20_000, 1, 2, 2, generator=generator(3))
    drawn = noise(x, 4, secret=11)
    assert drawn.isfinite().all()
    assert drawn.mean(dim=0).abs().max() < 0.03  # four deviations of a mean of 20,000
    assert (drawn.std(dim=0) - 1).abs().max() < 0.03
    assert (drawn.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.004)
    classes_and_neighbours = torch.cat([drawn[1:], drawn[:-1]], dim=1).T
    assert (torch.corrcoef(classes_and_neighbours) - torch.eye(8)).abs().max() < 0.035


def test_noise_depends_on_every_bit_of_the_image_and_on_the_secret() -> None:
    x = torch.rand(1, 1, 3, 3, generator=generator(4)).repeat(11, 1, 1, 1)
    for pixel in range(9):
        x[pixel].view(-1)[pixel] = torch.nextafter(x[pixel].view(-1)[pixel], torch.tensor(2.0))
    drawn = noise(x, 3, secret=11)
    assert torch.equal(drawn[9], drawn[10])
    assert len({tuple(row) for row in drawn.tolist()}) == 10
    assert not torch.isclose(noise(x, 3, secret=12), drawn).any()


def test_noise_does_not_tell_how_an_image_lies_in_memory_or_signs_its_zeros() -> None:
    x = torch.rand(8, 3, 4, 4, generator=generator(4)).round(decimals=1)
    drawn = noise(x, 5, secret=1)
    assert torch.equal(noise(x.to(memory_format=torch.channels_last), 5, secret=1), drawn)
    assert torch.equal(noise(torch.where(x == 0, -x, x), 5, secret=1), drawn)


@pytest.mark.parametrize("sigma", [0.001, 0.005])
def test_answers_scatter_by_sigma(sigma: float) -> None:
    z = rows(8, count=4000, scale=0.01)
    error = served(GaussianNoise(sigma), z).exp() - z.softmax(dim=1)
    expected = sigma * (7 / 8) ** 0.5  # renormalising takes the mean of the noise away
    assert error.std().item() == pytest.approx(expected, rel=0.04)


def test_asking_again_averages_no_noise_out_and_each_service_has_its_own() -> None:
    z = rows(10)
    again = torch.stack([served(GaussianNoise(), z) for _ in range(3)])
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], again[2])
    assert not torch.equal(served(GaussianNoise(), z, seed=1), again[0])


def test_no_noise_is_no_defense() -> None:
    torch.testing.assert_close(served(GaussianNoise(0.0), rows(10)), served(Defense(), rows(10)))


def test_what_noise_leaves_nothing_of_is_answered_uniformly() -> None:
    p = torch.tensor([[-0.5, -0.1, -0.2, -0.7], [0.5, -1.0, 1.5, 0.0]])
    near(renormalised(p).exp(), [[0.25, 0.25, 0.25, 0.25], [0.25, 0.0, 0.75, 0.0]], digits=6)
