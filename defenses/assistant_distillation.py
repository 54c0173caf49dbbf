"""Defensive distillation in a chain: Mandal & Gao, "Improving Defensive Distillation using Teacher Assistant",
2023; Papernot et al., "Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks", 2016."""

import copy
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import Context, Count, Defense, Positive, fit, predict_logits, soften


@dataclass(frozen=True)
class AssistantDistillation(Defense):
    """Trains a teacher on the labels at temperature T, then `steps` networks in a chain, each on its teacher's answers.

    Teacher: min CE(z / T, y). Each student: min CE(z / T, softmax(z_teacher / T)), with neither labels nor a factor T^2;
    answers are taken once, on the images without augmentation. All have the victim's architecture and start from the same
    weights, those of one epoch on the labels at T = 1. The last network is deployed, at T = 1. The victim itself is not
    used. steps = 1 is plain defensive distillation, 2 has one assistant (default), 6 is the code's longest chain.
    It is a defense against adversarial examples, not against model stealing. T = 20 is our choice: the paper's list was
    not found.
    """

    temperature: Positive = 20.0
    steps: Count = 2

    def harden(self, victim: nn.Module, ctx: Context) -> nn.Module:
        start = ctx.new_student()
        fit(start, F.cross_entropy, ctx.data.x, ctx.data.y, ctx.training(epochs=1))
        net = self._stage(start, ctx.data.y, ctx)
        for _ in range(self.steps):
            net = self._stage(start, soften(predict_logits(net, ctx.data.x), self.temperature), ctx)
        return net

    def _stage(self, start: nn.Module, target: Tensor, ctx: Context) -> nn.Module:
        net = copy.deepcopy(start)
        fit(net, self.loss, ctx.data.x, target, ctx)
        return net

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of softmax(z / T) with labels (N,) or probabilities (N,K), mean over the batch."""
        return F.cross_entropy(z / self.temperature, target)
