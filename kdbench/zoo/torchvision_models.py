"""The classification networks of torchvision, by its own names for them: `torchvision:resnet18`. Untrained, as all here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from kdbench.api import KdbenchError
from kdbench.errors import unknown

from .layers import Shape

RGB = 3
PROBED = 2  # images, made of nothing, by which a network shows that it takes their shape


class Torchvision:
    """torchvision:NAME is the classification network NAME of torchvision, untrained.

    The first convolution is made for the channels of the images. A vision transformer is made for their side; of the
    heads that GoogLeNet and Inception add for training there are none. Most of these networks halve an image five
    times: they were made for 224x224 pixels, and learn little from 32x32.
    """

    argument = "NAME"

    @staticmethod
    def from_argument(argument: str) -> Callable[[Shape, int], nn.Module]:
        """The factory of the network `argument`; raises `KdbenchError` with the nearest name when there is none."""
        from torchvision import models  # half a second

        known = models.list_models(module=models)
        if argument not in known:
            raise unknown("model", argument, known, "torchvision")

        def make(shape: Shape, classes: int) -> nn.Module:
            """A classification network of torchvision, untrained."""
            return _made(argument, shape, classes)

        return make


def _made(name: str, shape: Shape, classes: int) -> nn.Module:
    from torchvision import models

    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **_settings(name, shape))
        _open_to(network, shape[0])
        _probe(network, shape)
    except (RuntimeError, ValueError, AssertionError) as error:  # torchvision's words for an image that is too small
        size, reason = "x".join(str(side) for side in shape), str(error).partition("\n")[0].rstrip(".")
        raise KdbenchError(f"The network 'torchvision:{name}' cannot take images of {size} ({reason}).") from None
    return network


def _settings(name: str, shape: Shape) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": shape[1]}
    return {"input_size": shape[1:]} if name.startswith("maxvit_") else {}


def _open_to(network: nn.Module, channels: int) -> None:
    """Make the first convolution one for so many channels, its weights drawn as wide as torchvision drew them."""
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    if channels == first.in_channels:
        return
    with torch.no_grad():
        weight = torch.randn(first.out_channels, channels, *first.kernel_size) * first.weight.std()
    first.in_channels, first.weight = channels, nn.Parameter(weight)


def _probe(network: nn.Module, shape: Shape) -> None:
    """Let `network` answer images without content: it computes shapes only, and raises when they do not fit."""
    state = {name: value.to("meta") for name, value in network.state_dict(keep_vars=True).items()}
    network.eval()
    with torch.no_grad():
        functional_call(network, state, torch.zeros(PROBED, *shape, device="meta"))
    network.train()
