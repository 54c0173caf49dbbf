"""Networks of a stage: made from a seed, read from a finished stage, checked before they are kept."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench import registry
from kdbench.engine.tensors import load_weights, save_weights
from kdbench.errors import KdbenchError
from kdbench.game.data import Split
from kdbench.game.roles import Role, derive, seeded
from kdbench.training.fit import predict_logits

WEIGHTS = "weights.safetensors"
TRIED = 256  # images, enough to see that a network's answers are finite
ASSUMED_MEAN, ASSUMED_STD = 0.5, 0.25  # of pixels, where an attacker has no images


class Standardise(nn.Module):
    """Standardises pixels inside the model, so that every image outside of one is in [0,1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) in [0,1] -> the same with mean 0 and deviation 1 over the images of who trains the model."""
        return (x - self.mean) / self.std


@dataclass
class ModelFactory:
    """Makes networks for one role: of its own architecture or a named one, standardising as its images suggest.

    own: the registered name of the architecture. role: draws the initial weights. made: networks so far.
    """

    own: str
    data: Split
    seed: int
    role: Role
    device: str
    made: int = 0

    def __call__(self, name: str | None = None) -> nn.Module:
        """A fresh network; its weights depend on the seed, the role and how many were made before, on no other draw."""
        with seeded(derive(self.seed, self.role, name or self.own, self.made)):
            network = self._build(name or self.own)
        self.made += 1
        return network.to(self.device)

    def load(self, folder: Path) -> nn.Module:
        """The network of its own architecture whose weights a finished stage left in `folder`, in eval mode."""
        return load_weights(self._build(self.own), folder / WEIGHTS).to(self.device)

    def save(self, network: nn.Module, folder: Path, origin: str) -> None:
        """Write the weights of `network` into `folder`; origin: the method that made it, for the error.

        Raises `KdbenchError` when its architecture is not this factory's own, or its answers are not finite.
        """
        if _shapes(network) != _shapes(self._build(self.own)):
            raise KdbenchError(
                f"The {origin} must return a network of its side's architecture '{self.own}', as ctx.new_student() does."
            )
        images = self.data.x[:TRIED] if len(self.data) else torch.zeros(TRIED, *self.data.shape, device=self.device)
        if not predict_logits(network, images).isfinite().all():
            raise KdbenchError(f"The {origin} returned a network whose answers are not finite: its training diverged.")
        save_weights(network, folder / WEIGHTS)

    def _build(self, name: str) -> nn.Module:
        network: nn.Module = registry.load("model", name)(self.data.shape, self.data.classes)
        model = nn.Sequential(Standardise(*self._pixels()), network)
        # From the start: the layout decides in which order sums are taken, and a resumed run must take them alike.
        return model.to(memory_format=torch.channels_last)

    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the pixels of each channel."""
        if not len(self.data):
            channels = self.data.shape[0]
            return torch.full((channels,), ASSUMED_MEAN), torch.full((channels,), ASSUMED_STD)
        std, mean = torch.std_mean(self.data.x, dim=(0, 2, 3))
        return mean.cpu(), std.clamp_min(1e-3).cpu()


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}
