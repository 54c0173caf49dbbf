"""Augmentation on the device: a batch is one gather of random crops from images that were padded once."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdbench.game.methods import Recipe


def augmented(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A function: index (M,) -> those images of `x` (N,C,H,W) as random crops after zero padding, each flipped or not.

    The padded images are stored once, channels last, and a batch is one gather of their windows: nothing is copied twice.
    """
    pad, (images, channels, height, width) = recipe.crop, x.shape
    padded = x.new_zeros(images, height + 2 * pad, width + 2 * pad, channels)
    padded[:, pad : pad + height, pad : pad + width] = x.permute(0, 2, 3, 1)
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)

    def batch(index: Tensor) -> Tensor:
        corner = torch.zeros(2, len(index), dtype=torch.long, device=x.device)
        if pad:
            corner = torch.randint(2 * pad + 1, corner.shape, generator=generator, device=x.device)
        images = windows[index, corner[0], corner[1]]
        return _flipped(images, torch.rand(len(index), generator=generator, device=x.device)) if recipe.flip else images

    return batch


def _flipped(images: Tensor, chance: Tensor) -> Tensor:
    """Each of `images` (N,C,H,W) flipped from left to right where its `chance` (N,) is below 0.5."""
    if images.device.type == "cpu":
        chosen = (chance < 0.5).nonzero().flatten()
        images[chosen] = images[chosen].flip(3)
        return images
    # On an accelerator, counting the chosen would make the host wait for it.
    return torch.where((chance < 0.5)[:, None, None, None], images.flip(3), images)
