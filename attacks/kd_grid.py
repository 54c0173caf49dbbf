"""KD over a grid: the attacker of the Nasty Teacher's repository (ICLR 2021), which searches temperature and alpha."""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdbench.api import (
    Access,
    Attack,
    Context,
    Diverged,
    Fraction,
    KdbenchError,
    Oracle,
    Positive,
    QueryFunction,
    Share,
    Split,
    fit,
    predict_logits,
)

from .kd import kd_loss


@dataclass(frozen=True)
class KDGrid(Attack):
    """Runs KD at every point of a grid, chooses the best point on held-out images, and runs KD there on all images.

    The papers' results depend strongly on T, so a defense must hold against an attacker that searches it. Of each class of
    the attacker's images, a share `held_out` is kept from the candidates, which start from equal weights. The best point
    (of equals the earlier in the grid; by default KD's own settings come first) is trained anew on all images, as long as
    KD's student. So holding out costs nothing in the end, and a grid of one point is KD, bit for bit.
    Without labels there is no alpha (as in KD), the held-out images are drawn from all images alike, and a candidate's
    score is its fidelity: how often it gives the oracle's top answer.
    queries: "once" asks about each image once, for the whole grid. "augmented" asks about every augmented batch of every
    candidate and of the final student, and without labels about the held-out images. Written down: chosen_temperature,
    chosen_alpha, and validation_T..._alpha..., each candidate's accuracy on the held-out images, 0 if it diverged.
    """

    needs: ClassVar[Access] = Access.TOPK
    adaptive: ClassVar[bool] = True

    temperatures: tuple[Positive, ...] = (4.0, 1.0, 20.0)
    alphas: tuple[Share, ...] = (0.9, 0.5, 0.1)
    held_out: Fraction = 0.1
    queries: Literal["augmented", "once"] = "augmented"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures or not self.alphas:
            raise KdbenchError("KDGrid needs at least one temperature and one alpha to choose from.")

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        answers: Tensor | QueryFunction = oracle(ctx.data.x) if self.queries == "once" else oracle
        T, alpha = self._choose(student, answers, ctx)
        ctx.log("chosen_temperature", T)
        ctx.log("chosen_alpha", alpha)
        fit(student, kd_loss(T, alpha, ctx.data.labelled), ctx.data.x, (answers, ctx.data.y), ctx)
        return student

    def grid(self, labelled: bool) -> list[tuple[float, float]]:
        """The (temperature, alpha) there are to choose from; without labels alpha is 1."""
        alphas = self.alphas if labelled else (1.0,)
        return list(dict.fromkeys((T, alpha) for T in self.temperatures for alpha in alphas))

    def _choose(self, start: nn.Module, answers: Tensor | QueryFunction, ctx: Context) -> tuple[float, float]:
        grid = self.grid(ctx.data.labelled)
        if len(grid) == 1:
            return grid[0]
        chosen = hold_out(ctx.data.y, self.held_out, ctx.generator)
        if not chosen.any():
            raise KdbenchError("there is nothing to choose by: a class needs two images before one can be held out")
        rest, held_out = (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
        labels = self._labels(ctx.data.take(held_out), part_of(answers, held_out))
        scores = []
        for T, alpha in grid:
            candidate = copy.deepcopy(start)
            learnt = self._teach(candidate, T, alpha, ctx.data.take(rest), part_of(answers, rest), ctx)
            predicted = predict_logits(candidate, ctx.data.x[held_out]).argmax(dim=1)
            scores.append(float((predicted == labels).float().mean()) if learnt else 0.0)
            ctx.log(f"validation_T{T:g}_alpha{alpha:g}", scores[-1])
        return grid[scores.index(max(scores))]

    def _teach(
        self, candidate: nn.Module, T: float, alpha: float, data: Split, answers: Tensor | QueryFunction, ctx: Context
    ) -> bool:
        """Train `candidate` at one point of the grid; False where that diverged."""
        try:
            fit(candidate, kd_loss(T, alpha, data.labelled), data.x, (answers, data.y), ctx)
        except Diverged:
            return False
        return True

    def _labels(self, held_out: Split, answers: Tensor | QueryFunction) -> Tensor:
        """The labels (N,) by which candidates are scored: the true ones, or the oracle's where these are unknown."""
        if held_out.labelled:
            return held_out.y
        return (answers if isinstance(answers, Tensor) else answers(held_out.x)).argmax(dim=1)


def part_of(answers: Tensor | QueryFunction, index: Tensor) -> Tensor | QueryFunction:
    """The answers (N,K) at `index` (M,); a query function serves every part."""
    return answers[index] if isinstance(answers, Tensor) else answers


def hold_out(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A mask (N,) of the images to hold out, drawn: a `share` of those of each label in `y` (N,), at least one, not all."""
    chosen = torch.zeros_like(y, dtype=torch.bool)
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = torch.randperm(len(members), generator=generator, device=generator.device)
        chosen[members[order[:count]]] = True
    return chosen
