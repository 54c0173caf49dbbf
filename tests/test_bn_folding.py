"""A folded network computes the same function with weights of its own, whatever layers the network has."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from helpers import playable
from kdbench import registry
from kdbench.api import seeded
from kdbench.training.bn_folding import folded

NETWORKS = playable("model")
SIDE = 16  # the least that all networks take
# Norms right after a convolution; of pre-activation blocks (27 in preresnet-56) all but the first norm.
FOLDED = {"mini-8": 3, "cnn": 3, "resnet-18": 20, "vgg-11": 8, "preresnet-20": 9, "preresnet-56": 54, "wrn-16-1": 6}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """`network` with norms as after some training, of which no value is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for value, low, high in ((layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5)):
                if value is not None:
                    nn.init.uniform_(value, low, high, generator=generator)
            if layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.uniform_(-0.5, 0.5, generator=generator)
                layer.running_var.uniform_(0.5, 2, generator=generator)
    return network


def registered(name: str) -> nn.Module:
    with seeded(0):
        network: nn.Module = registry.load("model", name)((3, SIDE, SIDE), 10)
    return with_statistics(network).eval()


def images(count: int = 4, channels: int = 3, side: int = SIDE) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def answer(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a weighted sum of them in the images."""
    x = x.detach().requires_grad_()
    z: Tensor = network(x)
    weights = torch.linspace(-1, 1, z[0].numel(), dtype=z.dtype).reshape(z[0].shape)
    return z.detach(), torch.autograd.grad((z * weights).sum(), x)[0]


def same(form: nn.Module, network: nn.Module, x: Tensor, share: float = 1e-5) -> bool:
    """Whether answers and gradients differ by `share` of the largest at most."""
    pairs = zip(answer(form, x), answer(network, x), strict=True)
    return all(float((a - b).abs().max()) <= share * float(b.abs().max()) for a, b in pairs)


def folded_norms(form: nn.Module) -> int:
    """How many norms return their input."""
    norms = [layer for layer in form.modules() if isinstance(layer, nn.BatchNorm2d)]
    return sum(norm(x) is x for norm in norms for x in [torch.ones(2, norm.num_features, 1, 1)])


def pair(inputs: int = 3, outputs: int = 6, **options: bool) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    with seeded(2):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=options.pop("bias", False))
    return convolution, nn.BatchNorm2d(outputs, **options)


def sequence(*layers: nn.Module) -> nn.Module:
    return with_statistics(nn.Sequential(*layers)).eval()


class Code(nn.Module):
    """A convolution and a norm, and a function that uses them."""

    def __init__(self, forward: Callable[["Code", Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.norm = pair(3, 3)
        self.code = forward
        with_statistics(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


# The same function


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_and_gradients_of_every_network_stay_the_same_in_double_precision(name: str) -> None:
    """In fp64, where rounding cannot hide a mistake."""
    network, x = registered(name).double(), images(2).double()
    assert same(folded(network, x), network, x, share=1e-12)


@pytest.mark.parametrize("name", ["mini-8", "cnn", "preresnet-20", "wrn-16-2", "mobilenetv2", "shufflenetv2"])
def test_the_copy_holds_on_other_images_in_single_precision(name: str) -> None:
    network = registered(name)
    assert same(folded(network, images(2)), network, images(20)[2:], share=1e-4)


@pytest.mark.parametrize(("name", "count"), FOLDED.items())
def test_norms_right_after_convolutions_are_folded(name: str, count: int) -> None:
    assert folded_norms(folded(registered(name), images())) == count


@pytest.mark.parametrize("options", [{"bias": True}, {"affine": False}, {"bias": True, "affine": False}])
def test_a_pair_with_a_bias_or_without_an_affine_part_folds(options: dict[str, bool]) -> None:
    network = sequence(*pair(**options), nn.ReLU())
    form = folded(network, images())
    assert folded_norms(form) == 1
    assert same(form, network, images())


@pytest.mark.parametrize("side", [8, 32])
def test_small_and_large_images_get_the_same_answers(side: int) -> None:
    network, x = registered("mini-8"), images(side=side)[:, :3]
    assert same(folded(network, x), network, x)


def test_a_folded_network_can_be_folded_and_pickled() -> None:
    network = registered("mini-8")
    form = folded(network, images())
    assert same(folded(form, images()), network, images())
    assert torch.equal(pickle.loads(pickle.dumps(form))(images()), form(images()))


def test_answers_of_minus_infinity_are_kept() -> None:
    class Withheld(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = registered("mini-8")

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.network(x)
            return z.masked_fill(torch.arange(10) < 3, -torch.inf)

    form = folded(Withheld().eval(), images())
    assert folded_norms(form) == 3
    assert torch.equal(form(images()).isinf(), Withheld().eval()(images()).isinf())


# The network is not changed


@pytest.mark.parametrize("name", ["mini-8", "cnn", "preresnet-20"])
def test_the_network_is_left_as_it_was_and_the_copy_is_frozen(name: str) -> None:
    """In part in training mode, in part frozen; also its memory format."""
    network = registered(name).train().to(memory_format=torch.channels_last)
    next(network.children()).eval()
    next(network.parameters()).requires_grad_(False)
    before = copy.deepcopy(network)
    modes = [layer.training for layer in network.modules()]
    form = folded(network, images())
    assert [layer.training for layer in network.modules()] == modes
    assert all(
        torch.equal(a, b) and a.requires_grad == b.requires_grad and a.stride() == b.stride() and a.grad is None
        for a, b in zip(network.parameters(), before.parameters(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), before.buffers(), strict=True))
    assert not any(layer.training for layer in form.modules())
    assert not any(parameter.requires_grad for parameter in form.parameters())
    assert same(form, before.eval(), images())


def test_later_changes_of_the_network_do_not_change_its_folded_copy() -> None:
    network = registered("mini-8")
    form = folded(network, images())
    expected = form(images())
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.zero_()
    assert torch.equal(form(images()), expected)


def test_folding_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    folded(Code(lambda own, x: own.norm(own.convolution(x)) + torch.rand(())), images())
    assert torch.equal(torch.get_rng_state(), before)


# What is not folded, and why

UNFOLDED: dict[str, Callable[[Code, Tensor], Tensor]] = {
    "called twice": lambda own, x: own.norm(own.convolution(own.norm(own.convolution(x)))),
    "output used elsewhere": lambda own, x: own.norm(z := own.convolution(x)) + z,
    "output changed in place": lambda own, x: own.norm(own.convolution(x).mul_(2)),
    "changed in place, then normed": lambda own, x: (z := own.convolution(x)).mul_(2) + own.norm(z),
    "weights used elsewhere": lambda own, x: own.norm(own.convolution(x)) * own.convolution.weight.sum(),
    "norm before convolution": lambda own, x: own.convolution(own.norm(x)),
    "something between": lambda own, x: own.norm(own.convolution(x).relu()),
    "a branch on values": lambda own, x: own.norm(own.convolution(x)) if x.mean() > 0 else x,
    "a loop over images": lambda own, x: torch.cat([own.norm(own.convolution(part[None])) for part in x]),
    "the weight without its layer": lambda own, x: own.norm(nn.functional.conv2d(x, own.convolution.weight)),
}


@pytest.mark.parametrize("why", UNFOLDED)
def test_what_cannot_be_folded_answers_as_before(why: str) -> None:
    network = Code(UNFOLDED[why])
    form = folded(network, images())
    assert folded_norms(form) == 0
    assert same(form, network, images())


def test_a_norm_without_statistics_is_not_folded() -> None:
    network = sequence(*pair(track_running_stats=False))
    form = folded(network, images())
    assert folded_norms(form) == 0
    assert same(form, network, images())


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_computed_weights_are_not_folded_even_when_their_last_value_has_a_graph(wrap: Callable[..., nn.Module]) -> None:
    convolution, norm = pair()
    network = sequence(wrap(convolution), norm)
    network(images())
    form = folded(network, images())
    assert folded_norms(form) == 0
    assert same(form, network, images())


def test_convolutions_that_share_a_weight_both_answer_as_before() -> None:
    (first, norm), (second, other) = pair(3, 3), pair(3, 3)
    second.weight = first.weight
    network = sequence(first, norm, nn.ReLU(), second, other)
    assert same(folded(network, images()), network, images())


@pytest.mark.parametrize("watched", [0, 1], ids=["convolution", "norm"])
def test_a_layer_with_a_hook_is_not_folded_and_the_hook_sees_and_changes_what_it_did(watched: int) -> None:
    layers = pair()
    seen: list[Tensor] = []

    def double(layer: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
        seen.append(made.detach())
        return 2 * made

    layers[watched].register_forward_hook(double)
    network = sequence(*layers, *pair(6, 6))
    form = folded(network, images())
    assert folded_norms(form) == 1  # of the pair without a hook
    seen.clear()
    assert same(form, network, images())
    of_form, of_network = seen
    assert torch.allclose(of_form, of_network, atol=1e-5)


def test_a_subclass_of_a_layer_is_not_folded() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    network = sequence(pair()[0], Doubled(6))
    form = folded(network, images())
    assert folded_norms(form) == 0
    assert same(form, network, images())


def test_a_view_across_channels_gets_the_memory_format_that_it_needs() -> None:
    network = sequence(*pair(), nn.MaxPool2d(2), Code(lambda own, x: x.view(x.size(0), -1)))
    form = folded(network, images())
    assert folded_norms(form) == 1
    assert same(form, network, images())


def test_a_network_that_counts_its_queries_or_keeps_its_last_answer_can_be_folded() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.asked, self.last = registered("mini-8"), 0, torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.asked += 1
            self.last = self.network(x)
            return self.last

    network = Counting().eval()
    last = network(images())
    form = folded(network, images())
    assert network.asked == 1
    assert network.last is last
    assert folded_norms(form) == 3
    assert same(form, network, images())
