"""Knockoff Nets: Orekondy et al., "Knockoff Nets: Stealing Functionality of Black-Box Models", CVPR 2019."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import (
    Access,
    Attack,
    Context,
    Count,
    DataSubset,
    KdbenchError,
    Oracle,
    Positive,
    fit,
    kd_term,
    predict_logits,
)

COARSE = 8  # pixels a side of what images are clustered by
LLOYD = 10  # steps of k-means
LEAST = 1e-12  # of an unasked image's weight in a draw: when all that is likely has been asked, the rest is left


@dataclass(frozen=True)
class Knockoff(Attack):
    """Asks about natural images of another data set, `pool`, and distils what it is told; owns no image of the victim's.

    Each of at most `queries` images, as many as pool and budget have, is asked about once. The student learns them by
    the thief's recipe: KL at `temperature` alone, at 1 the soft cross-entropy of the paper up to a constant. policy:
    "random" draws images from the pool uniformly; "adaptive" is the paper's gradient bandit: it asks about `batch`
    images at a time, of kinds that have paid, in certainty (the margin of the top answer), diversity (sum_k max(0, y_k -
    mean y_k)) and the loss of a surrogate, each rescaled to [0,1]. The surrogate, a second network, learns each batch
    once before the next; the student that is returned is trained anew on all that was asked.
    Defaults: the official 60,000 queries; the thief's recipe, where the official code has its own (SGD 0.01, momentum
    0.5, 100 epochs, batch 64) and starts from ImageNet weights. The default pool needs no download: 20,000 pieces of two
    photographs, where the paper has ImageNet; what it does not steal says little of the attack.
    Departures, all of the adaptive policy: a kind is one of `clusters` of the pool, by k-means on coarse pixels, where
    the paper takes the pool's labels in a hierarchy; the bandit moves once a batch, and the mean reward, the mean
    answer and the ranges are those of the batch, where the paper takes them over a window of past images; no image is
    asked about twice.
    """

    needs: ClassVar[Access] = Access.LABEL

    pool: str = "photos"
    queries: Count = 60_000
    policy: Literal["random", "adaptive"] = "random"
    temperature: Positive = 1.0
    clusters: Count = 100
    batch: Count = 128

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()  # before the surrogate: it starts from the same weights as other thieves' students
        images = ctx.surrogate(self.pool)
        count = self._count(len(images), oracle)
        if self.policy == "random":
            index = torch.randperm(len(images), generator=ctx.generator, device=ctx.device)[:count]
            answers = oracle(images[index])
        else:
            hunt = self._active(images, count, oracle, ctx)
            index, answers = hunt.index, hunt.answers
        ctx.log("asked", count)
        ctx.log.images("asked", images[index[:64]])
        fit(student, self.loss, images[index], answers, ctx)
        return student

    def data_subset(self) -> DataSubset:
        return DataSubset(fraction=0.0)

    def surrogate_datasets(self) -> tuple[str, ...]:
        return (self.pool,)

    def loss(self, z: Tensor, log_p: Tensor) -> Tensor:
        """The KL of standard KD for logits `z` (N,K) and the oracle's answers (N,K)."""
        return kd_term(z, log_p, self.temperature)

    def _count(self, images: int, oracle: Oracle) -> int:
        """How many of so many images are asked about."""
        count = min(self.queries, images, self.queries if oracle.left is None else oracle.left)
        if count < 1:
            raise KdbenchError(f"there is nothing to ask: the pool '{self.pool}' or the budget is empty")
        return count

    def _active(self, images: Tensor, count: int, oracle: Oracle, ctx: Context) -> "QueryCampaign":
        """Ask about `count` images, a batch at a time. An interrupted run goes on after the last batch that was saved."""
        surrogate = ctx.new_student().eval()
        coarse = F.adaptive_avg_pool2d(images, COARSE).flatten(1)
        kind = clustered(coarse, min(self.clusters, len(images)), ctx.generator)
        slot = ctx.log.slot()
        hunt = self._resume(slot, surrogate, kind, ctx)
        while (asked := len(hunt.index)) < count:
            if asked:  # a lesson before each batch but the first: none after the last, which may be a single image
                last = slice(asked - self.batch, asked)
                fit(surrogate, self.loss, images[hunt.index[last]], hunt.answers[last], ctx.training(epochs=1))
            index = hunt.draw(kind, min(self.batch, count - asked), ctx.generator)
            answers = oracle(images[index])
            hunt = hunt.grown(index, answers, kind[index], rewards(answers, predict_logits(surrogate, images[index])))
            ctx.log.progress(len(hunt.index) / count, f"{len(hunt.index)}/{count} images asked about")
            if ctx.log.due():
                ctx.log.save(slot, {"hunt": vars(hunt), "surrogate": surrogate.state_dict()})
        return hunt

    def _resume(self, slot: str, surrogate: nn.Module, kind: Tensor, ctx: Context) -> "QueryCampaign":
        state = ctx.log.load(slot)
        if state is None:
            return QueryCampaign.new(int(kind.max()) + 1, ctx)
        hunt = QueryCampaign(**{name: value.to(ctx.device) for name, value in state["hunt"].items()})
        surrogate.load_state_dict(state["surrogate"])
        for _ in range((len(hunt.index) - 1) // self.batch):
            ctx.log.slot()  # each lesson that is over had one: the pieces of work to come keep their names
        return hunt


@dataclass(frozen=True)
class QueryCampaign:
    """The images asked about, `index` (M,), and the answers (M,K); of each kind, the preference and the `draws` so far (Z,)."""

    index: Tensor
    answers: Tensor
    preference: Tensor
    draws: Tensor

    @classmethod
    def new(cls, kinds: int, ctx: Context) -> "QueryCampaign":
        """Nothing asked, no kind preferred."""
        index = torch.empty(0, dtype=torch.long, device=ctx.device)
        answers = torch.empty(0, ctx.data.classes, device=ctx.device)
        return cls(index, answers, *(torch.zeros(kinds, device=ctx.device) for _ in range(2)))

    def draw(self, kind: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The next `count` images (M,): a kind by softmax(preference), of it any image not yet asked about; kind (P,)."""
        fresh = torch.ones_like(kind, dtype=torch.bool)
        fresh[self.index] = False
        left = F.one_hot(kind[fresh], len(self.preference)).sum(dim=0).clamp_min(1)
        weight = (self.preference.softmax(dim=0) / left)[kind].clamp_min(LEAST) * fresh
        return weight.multinomial(count, generator=generator)

    def grown(self, index: Tensor, answers: Tensor, kind: Tensor, reward: Tensor) -> "QueryCampaign":
        """With one more batch of images `index` (M,), of `kind` (M,), that paid `reward` (M,): the bandit's update.

        For each image, its kind's preference moves by a (r - mean r)(1 - pi), all others' by -a (r - mean r) pi, a being
        one over the kind's number of draws.
        """
        drawn = F.one_hot(kind, len(self.preference)).to(reward)
        draws = self.draws + drawn.sum(dim=0)
        gain = (reward - reward.mean()) / draws[kind]
        preference = self.preference + gain @ drawn - gain.sum() * self.preference.softmax(dim=0)
        return QueryCampaign(torch.cat([self.index, index]), torch.cat([self.answers, answers]), preference, draws)


def rewards(log_p: Tensor, z: Tensor) -> Tensor:
    """What each image paid (N,), from 0 to 3, for the oracle's answers `log_p` (N,K) and the surrogate's logits `z` (N,K)."""
    p = log_p.exp()
    first, second = p.topk(2, dim=1).values.T
    diversity = (p - p.mean(dim=0)).clamp_min(0).sum(dim=1)
    loss = F.cross_entropy(z, p, reduction="none")
    return torch.stack([rescaled(values) for values in (first - second, diversity, loss)]).sum(dim=0)


def rescaled(values: Tensor) -> Tensor:
    """`values` (N,) on a scale from the least, 0, to the greatest, 1; 0 where all are equal."""
    least, greatest = values.aminmax()
    return (values - least) / (greatest - least).clamp_min(torch.finfo(values.dtype).tiny)


def clustered(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Which of `count` clusters (N,) each of the points `x` (N,D) is in, by k-means from points drawn at random."""
    order = torch.randperm(len(x), generator=generator, device=x.device)
    centres = x[order[:count]]
    for _ in range(LLOYD):
        # Not index_add: on a GPU it sums in another order each time.
        member = F.one_hot(nearest(x, centres), count).to(x)
        size = member.sum(dim=0)[:, None]
        centres = torch.where(size > 0, member.T @ x / size.clamp_min(1), centres)
    return nearest(x, centres)


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest of `centres` (Z,D) to each of the points `x` (N,D), (N,)."""
    return torch.cat([torch.cdist(part, centres).argmin(dim=1) for part in x.split(8192)])
