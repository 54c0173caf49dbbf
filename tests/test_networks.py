"""Networks: their parameter counts and sizes."""

import pytest
import torch
from paper_networks import COUNTS, FACTORIES, MNIST, TINY, networks, plan
from torch import nn

from kdbench.api import KdbenchError
from kdbench.zoo.layers import Shape

SMALLEST = {
    "cnn": 8,
    "takd-plane-2": 4,
    "takd-plane-4": 4,
    "takd-plane-6": 8,
    "takd-plane-8": 16,
    "takd-plane-10": 16,
    "distillation-mnist": 16,
    "distillation-cifar10": 16,
}


AVERAGING = sorted(set(FACTORIES) - set(SMALLEST))


# Sizes


@pytest.mark.parametrize(("name", "factory", "shape", "classes", "count"), COUNTS)
def test_a_network_has_as_many_parameters_as_published(
    name: str, factory: object, shape: Shape, classes: int, count: int
) -> None:
    assert FACTORIES[name] is factory
    assert sum(parameter.numel() for parameter in plan(name, shape, classes).parameters()) == count


@networks
@pytest.mark.parametrize("shape", [MNIST, TINY, (3, 40, 48)])
def test_a_network_gives_logits_for_images_of_its_shape(name: str, shape: Shape) -> None:
    assert plan(name, shape, 100)(torch.empty(2, *shape, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("name", AVERAGING)
def test_a_network_that_averages_has_the_same_parameters_whatever_the_size_and_takes_even_8x8(name: str) -> None:
    small, large = (
        {key: value.shape for key, value in plan(name, (3, side, side)).state_dict().items()} for side in (8, 64)
    )
    assert list(small.values()) == list(large.values())
    assert plan(name, (3, 8, 8))(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 10)


@pytest.mark.parametrize(("name", "smallest"), SMALLEST.items())
def test_a_network_that_flattens_refuses_images_of_which_nothing_would_be_left(name: str, smallest: int) -> None:
    shape = (3, smallest, smallest + 3)
    assert plan(name, shape)(torch.empty(2, *shape, device="meta")).shape == (2, 10)
    with pytest.raises(KdbenchError, match=f"^The network '{name}' needs images of {smallest}x{smallest} or more, not"):
        plan(name, (3, smallest + 3, smallest - 1))


@pytest.mark.parametrize(
    ("name", "side", "of_64"),
    [
        ("preresnet-20", 8, 16),
        ("preresnet-110", 8, 16),
        ("resnet-18", 4, 8),
        ("resnet-50", 4, 8),
        ("resnext-29", 8, 16),
        ("mobilenetv2", 5, 9),  # 34, 17, 9, 5: the stem pads
        ("shufflenetv2", 4, 8),
        ("wrn-40-2", 8, 16),
        ("vgg-11", 4, 4),
        ("takd-resnet-20", 8, 16),
    ],
)
def test_the_maps_that_are_averaged_have_the_published_size(name: str, side: int, of_64: int) -> None:
    for pixels, expected in ((32, side), (64, of_64)):
        model, sizes = plan(name, (3, pixels, pixels)), []
        (pool,) = (layer for layer in model.modules() if isinstance(layer, nn.AdaptiveAvgPool2d))
        pool.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(inputs[0].shape[2:]))
        model(torch.empty(2, 3, pixels, pixels, device="meta"))
        assert sizes == [(expected, expected)]


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("preresnet-20", 20),
        ("preresnet-32", 32),
        ("preresnet-44", 65),  # bottlenecks: the official code's names understate these
        ("preresnet-56", 83),
        ("preresnet-110", 164),
        ("resnet-18", 18),
        ("resnet-34", 34),
        ("resnet-50", 50),
        ("resnext-29", 29),
        *((name, int(name.rpartition("-")[2])) for name in FACTORIES if name.startswith("takd-resnet")),
    ],
)
def test_a_residual_network_is_as_deep_as_it_says(name: str, depth: int) -> None:
    layers = [key for key, layer in plan(name).named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len([key for key in layers if "shortcut" not in key]) == depth


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("cnn", nn.ReLU, 3 + 1),
        ("preresnet-20", nn.ReLU, 2 * 9 + 1),
        ("mobilenetv2", nn.ReLU6, 1 + 2 * 17 + 1),  # none after the last 1x1 of a block
        ("shufflenetv2", nn.ReLU, 3 * 3 + 2 * 13 + 1),  # none after the stem
        ("wrn-16-1", nn.ReLU, 2 * 6 + 1),
        ("vgg-11", nn.ReLU, 8),
        ("takd-plane-6", nn.ReLU, 6),
        ("takd-plane-10", nn.ReLU, 10 + 1),
        ("distillation-mnist", nn.ReLU, 4 + 2),
    ],
)
def test_a_network_activates_as_often_as_published(name: str, kind: type[nn.Module], count: int) -> None:
    layers = list(plan(name).modules())
    assert sum(type(layer) is kind for layer in layers) == count
    assert sum(isinstance(layer, nn.ReLU | nn.ReLU6) for layer in layers) == count
