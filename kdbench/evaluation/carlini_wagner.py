"""C&W: the smallest L2 perturbations of Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017."""

import torch
from torch import Tensor, nn

from kdbench.evaluation.adversarial import Robustness, are_images
from kdbench.evaluation.network import EvaluatedNetwork, frozen_in_eval_mode
from kdbench.evaluation.predictions import BATCH, predict_labels
from kdbench.game.data import Split


def carlini_wagner(
    network: EvaluatedNetwork, data: Split, predicted: Tensor, robustness: Robustness
) -> dict[str, float]:
    """cw_success: share of correctly classified images that C&W makes misclassified. cw_l2: mean L2 norm, in pixels.

    predicted: the labels (N,) that the network gives to `data`. Norms are those of the successful perturbations,
    measured from the images, not from their insets. Absent below the level "more"; the norm is absent when C&W never
    succeeds, and both are when no image is classified correctly.
    """
    correct = data.take((predicted == data.y).nonzero().flatten())
    if robustness.level in ("none", "fast") or not len(correct):
        return {}
    with frozen_in_eval_mode(network.network):
        norms = _norms(network, correct, robustness)
    success = {"cw_success": len(norms) / len(correct)}
    return success | {"cw_l2": float(norms.mean())} if len(norms) else success


def _norms(network: EvaluatedNetwork, correct: Split, robustness: Robustness) -> Tensor:
    """L2 norms of the successful perturbations of `correct`, as many as there are."""
    import torchattacks  # a second, needed nowhere else

    attack = torchattacks.CW(
        _AboveZero(network.attacked),
        c=robustness.cw_c,
        kappa=robustness.cw_kappa,
        steps=robustness.cw_steps,
        lr=robustness.cw_lr,
    )
    found = []
    for x, y in zip(torch.split(correct.x, BATCH), torch.split(correct.y, BATCH), strict=True):
        moved = attack(x.clamp(robustness.cw_inset, 1 - robustness.cw_inset), y)
        misclassified = are_images(moved) & (predict_labels(network.network, moved) != y)
        found.append((moved - x)[misclassified].flatten(1).norm(dim=1))
    return torch.cat(found)


class _AboveZero(nn.Module):
    """The same network, each image's logits shifted so that the least is 1.

    torchattacks' C&W excludes a class by multiplying its logit with 0, which excludes nothing among negative logits: a
    network whose logits are all negative (log-probabilities, say) would seem to withstand it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()  # torchattacks would put the network into training mode after the attack, as it found its wrapper

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K), the least of each row 1."""
        z: Tensor = self.model(x)
        return z - z.detach().amin(dim=1, keepdim=True) + 1
