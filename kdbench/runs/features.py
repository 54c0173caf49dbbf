"""Features of a network: what enters its classifier, and where t-SNE puts that in the plane."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdbench.errors import KdbenchError
from kdbench.training.fit import predict_logits

BATCH = 250  # images that a network is given at once
PERPLEXITY = 30  # of t-SNE, in a set that is large enough
Places = NDArray[np.floating]


def penultimate(network: nn.Module, x: Tensor, classes: int) -> Tensor:
    """What enters the classifier of `network` (N,D) for images `x` (N,C,H,W); feature maps are averaged over positions.

    The classifier is the linear layer or 1x1 convolution with one output a class that is called last, wherever it stands
    in the network. Raises `KdbenchError` when there is none.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach())

    hooks = [layer.register_forward_pre_hook(keep) for layer in network.modules() if _classifies(layer, classes)]
    parts: list[Tensor] = []
    try:
        for part in x.split(BATCH):
            predict_logits(network, part)
            parts += seen[-1:]
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if not parts:
        raise KdbenchError(f"The network {type(network).__name__} has no linear layer with {classes} outputs.")
    features = torch.cat(parts)
    return features.flatten(2).mean(2) if features.ndim > 2 else features


def _classifies(layer: nn.Module, classes: int) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.out_channels == classes
    return isinstance(layer, nn.Linear) and layer.out_features == classes


def plane(features: Tensor) -> Places:
    """Places (N,2) of features (N,D) by t-SNE, the same every time."""
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(PERPLEXITY, (len(features) - 1) / 3), init="pca", random_state=0)
    places: Places = tsne.fit_transform(features.cpu().float().numpy())
    return places
