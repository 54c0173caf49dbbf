"""Networks: their laws, how weights start, and their blocks."""

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from paper_networks import CIFAR, FACTORIES, MNIST, images, network, networks, plan
from torch import nn

from kdbench.api import seeded
from kdbench.zoo import preresnet, residual, wrn
from kdbench.zoo.mobilenet import Inverted
from kdbench.zoo.shufflenet import Keeping, shuffled

# Laws


@networks
def test_a_network_answers_in_training_and_in_use_and_repeats_itself_in_use(name: str) -> None:
    model, x = network(name), images(2, *CIFAR)
    z = model.train()(x)
    assert z.shape == (2, 10)
    assert z.isfinite().all()
    z = model.eval()(x)
    assert z.isfinite().all()
    assert torch.equal(model(x), z)


@networks
def test_an_image_is_answered_alike_alone_and_among_others_and_in_any_memory_format(name: str) -> None:
    model, x = network(name).eval(), images(3, *CIFAR)
    with torch.no_grad():
        z = model(x)
        alone = torch.cat([model(image) for image in x.split(1)])
        model = model.to(memory_format=torch.channels_last)
        last = model(x.contiguous(memory_format=torch.channels_last))
    rounding = 1e-4 * float(z.abs().max())
    torch.testing.assert_close(alone, z, rtol=0, atol=rounding)
    torch.testing.assert_close(last, z, rtol=0, atol=rounding)


@networks
def test_every_parameter_learns(name: str) -> None:
    # In use: in training a batch norm takes away what the bias before it adds.
    model = network(name).eval()
    F.cross_entropy(model(images(2, *CIFAR)), torch.tensor([0, 1])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@networks
def test_a_network_survives_the_trip_through_a_file(name: str) -> None:
    model, other = network(name), network(name, seed=1)
    model.train()(images(2, *CIFAR))  # so that the running statistics are worth keeping
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    x = images(2, *CIFAR)
    assert torch.equal(model.eval()(x), other.eval()(x))


@networks
def test_the_same_seed_gives_the_same_network_and_another_seed_another(name: str) -> None:
    first, again, other = (network(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key in first if first[key].ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


# How weights start


@pytest.mark.parametrize("name", ["preresnet-20", "preresnet-44", "resnext-29", "wrn-16-2", "vgg-11", "takd-resnet-20"])
def test_convolutions_start_from_he_normal_weights(name: str) -> None:
    layers = [layer for layer in network(name).modules() if isinstance(layer, nn.Conv2d)]
    large = [layer for layer in layers if layer.weight.numel() > 2000]
    assert large
    for layer in large:
        expected = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.1)
        assert float(layer.weight.detach().abs().max()) > 2.5 * expected, "a normal distribution has tails"
    assert not any(layer.bias.any() for layer in layers if layer.bias is not None)


@pytest.mark.parametrize("name", ["cnn", "resnet-18", "resnet-50", "mobilenetv2", "shufflenetv2", "takd-plane-4"])
def test_the_other_networks_start_as_torch_starts_them(name: str) -> None:
    for layer in network(name).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert 0.5 * bound < layer.weight.abs().max() <= bound * 1.001


@pytest.mark.parametrize("name", ["distillation-mnist", "distillation-cifar10"])
def test_the_networks_of_defensive_distillation_start_as_keras_starts_them(name: str) -> None:
    for layer in network(name).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            outputs, inputs, *field = layer.weight.shape
            bound = math.sqrt(6 / ((inputs + outputs) * math.prod(field)))
            assert 0.95 * bound < layer.weight.abs().max() <= bound * 1.001
            assert layer.bias is not None
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("name", "std"), [("vgg-11", 0.01), ("resnext-29", math.sqrt(2 / 1024)), ("preresnet-20", 1 / math.sqrt(3 * 64))]
)
def test_classifiers_start_as_published(name: str, std: float) -> None:
    weight = network(name, classes=100).get_parameter("classifier.weight")
    assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)


# Blocks


def test_a_preactivation_shortcut_sees_what_entered_and_a_wide_one_what_was_activated() -> None:
    x = images(2, 8, 6, 6)
    for make in (preresnet.preactivated_basic, preresnet.preactivated_bottleneck, wrn.Wide):
        with seeded(0), torch.no_grad():
            block = make(8, 16, 2).eval()
            *_, last = (layer for layer in block.get_submodule("branch") if isinstance(layer, nn.Conv2d))
            last.weight.zero_()
            odd = torch.allclose(block(-x), -block(x))  # a convolution of x without bias is odd, one of relu(x) is not
        assert odd is not isinstance(block, wrn.Wide), make


def test_a_residual_block_activates_the_sum_and_the_other_blocks_do_not() -> None:
    x = images(2, 8, 6, 6)
    with seeded(0):
        for block in (residual.basic, residual.bottleneck):
            assert block(8, 8, 1)(x).min() == 0
        for block in (preresnet.preactivated_basic, preresnet.preactivated_bottleneck, wrn.Wide, Inverted):
            assert block(8, 8, 1)(x).min() < 0


def test_a_block_whose_branch_is_silent_passes_on_what_entered() -> None:
    x = images(2, 8, 6, 6)
    for make in (
        residual.basic,
        residual.bottleneck,
        preresnet.preactivated_basic,
        preresnet.preactivated_bottleneck,
        wrn.Wide,
        Inverted,
    ):
        block = make(8, 8, 1)
        for parameter in block.get_submodule("branch").parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(block(x), x.relu() if isinstance(block, residual.Residual) else x), make


def test_a_shuffling_block_leaves_half_of_the_channels_as_they_are() -> None:
    x = images(2, 8, 6, 6)
    assert torch.equal(Keeping(8)(x)[:, ::2], x[:, :4])


def test_a_bottleneck_strides_in_its_3x3_convolution() -> None:
    for block in (residual.bottleneck(8, 16, 2), preresnet.preactivated_bottleneck(8, 16, 2)):
        branch = block.get_submodule("branch")
        strides = [layer.stride for layer in branch.modules() if isinstance(layer, nn.Conv2d)]
        assert strides == [(1, 1), (2, 2), (1, 1)]


def test_shuffled_halves_lie_in_turns() -> None:
    first, second = images(2, 6, 3, 3), -images(2, 6, 3, 3)
    assert torch.equal(shuffled(first, second), F.channel_shuffle(torch.cat([first, second], dim=1), 2))


def test_dropout_of_defensive_distillation_is_there_in_training_only() -> None:
    model, x = network("distillation-mnist", MNIST), images(2, *MNIST)
    with seeded(0):
        assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("name", [name for name in FACTORIES if name.startswith("takd-plane")])
def test_up_to_10_classes_a_plane_network_has_the_layout_for_cifar_10(name: str) -> None:
    def widths(classes: int) -> list[int]:
        return [layer.out_channels for layer in plan(name, classes=classes).modules() if isinstance(layer, nn.Conv2d)]

    assert len(widths(10)) == int(name.rpartition("-")[2])
    assert widths(3) == widths(10)
    assert widths(11) == widths(200)
    assert (widths(10) == widths(11)) is (name == "takd-plane-10")
