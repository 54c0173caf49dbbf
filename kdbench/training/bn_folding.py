"""Batch-norm folding: the same network with batch norms merged into the convolutions before them, which is faster."""

import copy
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kdbench.game.roles import seeded

COMPARED = 16  # images on which a folded network has to give the answers of the network itself
ROUNDING = 1e-4  # by which its answers may differ, as a share of the largest of them
WIDE = 16 * 16  # pixels above which convolutions on a CPU are faster in channels-last order


def folded(network: nn.Module, x: Tensor) -> nn.Module:
    """A frozen copy of `network` in eval mode, for queries and attacks: each `BatchNorm2d` right after a `Conv2d` is
    folded into it, and on a CPU the weights have the memory format that is faster there.

    x: images (N,C,H,W) on the network's device. The copy has given the answers of the network on the first of them, up
    to `ROUNDING`; where no faster form does, it is a plain copy. That is so for networks that torch.fx cannot trace
    (branches on values) or that need one memory format (`view` across channels). A layer stays as it is when it has
    hooks, is called more than once, shares its output or its weights with other code, or has no running statistics.
    Hooks are copied too; objects in their closures are shared with the original. `network` itself is not changed.
    """
    plain, x = _copy(network), x[:COMPARED]
    expected = _answers(plain, x)
    forms = (_fold(_copy(network)).to(memory_format=memory_format) for memory_format in _formats(network, x))
    return next((form for form in forms if _agrees(form, x, expected)), plain)


def _formats(network: nn.Module, x: Tensor) -> list[torch.memory_format]:
    """Memory formats of weights, the faster first. On CPUs, channels-last pays for large images and for pooling."""
    if x.device.type != "cpu":
        return [torch.preserve_format]
    pools = any(isinstance(layer, nn.MaxPool2d) for layer in network.modules())
    lasts = [torch.channels_last] if pools or x.shape[2:].numel() > WIDE else []
    return [*lasts, torch.contiguous_format]


def _copy(network: nn.Module) -> nn.Module:
    """A frozen copy in eval mode; also of networks that keep computed tensors, as old-style weight norm does."""
    kept = (value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor))
    memo = {id(value): value.detach().clone() for value in kept if not value.is_leaf}  # deepcopy refuses these
    return copy.deepcopy(network, memo).eval().requires_grad_(False)


def _answers(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), seeded(0, str(x.device)):  # a network that draws random numbers draws the same each time
        answers: Tensor = network(x)
    return answers


def _agrees(network: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        answers = _answers(network, x)
    except RuntimeError:  # a view that this memory format does not allow
        return False
    room = ROUNDING * float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    return bool(torch.isclose(answers, expected, rtol=0, atol=room, equal_nan=True).all())


def _fold(network: nn.Module) -> nn.Module:
    """Fold in place. The network keeps running its own code; the trace is used only for which layer follows which."""
    for convolution, norm in list(_pairs(network)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        # Made an identity, not replaced in its parent: the network may hold the layer in more than one place.
        norm.forward = _identity  # type: ignore[method-assign]
    return network


def _identity(input: Tensor) -> Tensor:
    return input


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose output goes to one batch norm and nowhere else."""
    graph = _trace(network)
    nodes = list(graph.nodes) if graph else []
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    read = {node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"}  # weights that other code uses
    layers = {name: layer for name, layer in network.named_modules() if calls[name] == 1 and name not in read}
    for node in nodes:
        convolution, norm = layers.get(_before(node)), layers.get(str(node.target))
        # Exact types: a subclass may do anything.
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and _plain(convolution, norm):
            yield convolution, norm


def _before(node: fx.Node) -> str:
    """The name of the layer whose output is this layer's only input, and goes nowhere else; "" if there is none."""
    before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
    if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
        return str(before.target)
    return ""


def _plain(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether there are statistics to fold, and neither layer has hooks (which may set weights) or a patched `forward`."""
    pair = (convolution, norm)
    hooks = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in pair]
    return norm.running_mean is not None and not any(hooks) and not any("forward" in vars(m) for m in pair)


def _trace(network: nn.Module) -> fx.Graph | None:
    scratch = copy.deepcopy(network)  # a network may keep the tracer's proxies
    try:
        with seeded(0):
            return fx.Tracer().trace(scratch)
    except Exception:  # a network may do anything with the tracer's proxies, and raise anything
        return None
