"""Knockoff Nets: Orekondy et al., "Knockoff Nets: Stealing Functionality of Black-Box Models", CVPR 2019."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    restore,
)

COARSE = 8  # pixels a side of what images are clustered by
LLOYD = 10  # steps of k-means
LEAST = 1e-12  # the least weight of an image not yet asked about: unlikely kinds are drawn when the others are used up


@dataclass(frozen=True)
class Knockoff(Attack):
    """Asks about natural images of another data set, `surrogate`, and distils the answers; has no image of the victim's.

    Each of at most `queries` images, as many as the surrogate data and the budget allow, is asked about once. The student
    learns them by the attacker's recipe, with the KL at `temperature` alone; at 1 this is the soft cross-entropy of the
    paper up to a constant. policy: "random" draws images uniformly. "adaptive" is the paper's gradient bandit: it asks
    about `batch` images at a time, of kinds that were rewarded. A reward is the sum of certainty (the margin of the top
    answer), diversity (sum_k max(0, y_k - mean y_k)) and the loss of a second network, each rescaled to [0,1]. The second
    network learns each batch once before the next one. The student that is returned is trained anew on all answers.

    Defaults: the official 60,000 queries; the attacker's recipe, where the official code has its own (SGD 0.01, momentum
    0.5, 100 epochs, batch 64) and starts from ImageNet weights. The default surrogate data need no download: 20,000 crops
    of two photographs, where the paper has ImageNet. A low student accuracy on them says little about the attack. Written
    down: asked, the number of images.
    Departures, all of the adaptive policy: a kind is one of `clusters` of the images, by k-means on coarse pixels, where
    the paper has the labels of the surrogate data in a hierarchy. The bandit is updated once a batch; the mean reward, the
    mean answer and the ranges are those of the batch, where the paper takes them over a window of past images. No image is
    asked about twice.
    """

    needs: ClassVar[Access] = Access.LABEL
    renamed: ClassVar[Mapping[str, str]] = {"pool": "surrogate"}

    surrogate: str = "photos"
    queries: Count = 60_000
    policy: Literal["random", "adaptive"] = "random"
    temperature: Positive = 1.0
    clusters: Count = 100
    batch: Count = 128

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = (
            ctx.new_student()
        )  # before the second network: it starts from the same weights as other attacks' students
        images = ctx.surrogate(self.surrogate)
        count = self._count(len(images), oracle)
        if self.policy == "random":
            index = torch.randperm(len(images), generator=ctx.generator, device=ctx.device)[:count]
            answers = oracle(images[index])
        else:
            campaign = self._adaptive(images, count, oracle, ctx)
            index, answers = campaign.index, campaign.answers
        ctx.log("asked", count)
        ctx.log.images("asked", images[index[:64]])
        fit(student, self.loss, images[index], answers, ctx)
        return student

    def data_subset(self) -> DataSubset:
        return DataSubset(fraction=0.0)

    def surrogate_datasets(self) -> tuple[str, ...]:
        return (self.surrogate,)

    def loss(self, z: Tensor, log_p: Tensor) -> Tensor:
        """The KL of standard KD for logits `z` (N,K) and the oracle's answers (N,K)."""
        return kd_term(z, log_p, self.temperature)

    def _count(self, images: int, oracle: Oracle) -> int:
        """How many of so many images are asked about."""
        count = min(self.queries, images, self.queries if oracle.left is None else oracle.left)
        if count < 1:
            raise KdbenchError(f"there is nothing to ask: the data set '{self.surrogate}' or the budget is empty")
        return count

    def _adaptive(self, images: Tensor, count: int, oracle: Oracle, ctx: Context) -> "QueryCampaign":
        """Ask about `count` images, a batch at a time. An interrupted run goes on after the last batch that was saved."""
        learner = ctx.new_student().eval()
        coarse = F.adaptive_avg_pool2d(images, COARSE).flatten(1)
        kind = clustered(coarse, min(self.clusters, len(images)), ctx.generator)
        checkpoint = ctx.checkpoint("campaign")
        campaign = self._resumed(checkpoint.load(), learner, kind, ctx)
        while (asked := len(campaign.index)) < count:
            if asked:  # before each batch but the first: none after the last, which may be a single image
                self._teach(learner, images, campaign, ctx)
            index = campaign.draw(kind, min(self.batch, count - asked), ctx.generator)
            answers = oracle(images[index])
            reward = rewards(answers, predict_logits(learner, images[index]))
            campaign = campaign.grown(index, answers, kind[index], reward)
            ctx.log.progress(len(campaign.index) / count, f"{len(campaign.index)}/{count} images asked about")
            if checkpoint.due():
                checkpoint.save({"campaign": vars(campaign), "learner": learner.state_dict()})
        return campaign

    def _resumed(self, state: Any, learner: nn.Module, kind: Tensor, ctx: Context) -> "QueryCampaign":
        if state is None:
            return QueryCampaign.new(int(kind.max()) + 1, ctx)
        restore(learner, state["learner"])
        return QueryCampaign(**{name: value.to(ctx.device) for name, value in state["campaign"].items()})

    def _teach(self, learner: nn.Module, images: Tensor, campaign: "QueryCampaign", ctx: Context) -> None:
        """One epoch of the second network on the last batch of the campaign."""
        asked = len(campaign.index)
        last = slice(asked - self.batch, asked)
        x, answers = images[campaign.index[last]], campaign.answers[last]
        fit(learner, self.loss, x, answers, ctx.training(epochs=1), f"learner/{asked}")


@dataclass(frozen=True)
class QueryCampaign:
    """The images asked about, `index` (M,), and the answers (M,K); of each kind (Z,), its preference and number of draws."""

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
        """With one more batch of images `index` (M,), of `kind` (M,), with rewards (M,): the bandit's update.

        For each image, its kind's preference moves by a (r - mean r)(1 - pi), all others' by -a (r - mean r) pi, a being
        one over the kind's number of draws.
        """
        drawn = F.one_hot(kind, len(self.preference)).to(reward)
        draws = self.draws + drawn.sum(dim=0)
        gain = (reward - reward.mean()) / draws[kind]
        preference = self.preference + gain @ drawn - gain.sum() * self.preference.softmax(dim=0)
        return QueryCampaign(torch.cat([self.index, index]), torch.cat([self.answers, answers]), preference, draws)


def rewards(log_p: Tensor, z: Tensor) -> Tensor:
    """The reward (N,), from 0 to 3, of each image: answers `log_p` (N,K), logits `z` (N,K) of the second network."""
    p = log_p.exp()
    first, second = p.topk(2, dim=1).values.T
    diversity = (p - p.mean(dim=0)).clamp_min(0).sum(dim=1)
    loss = F.cross_entropy(z, p, reduction="none")
    return torch.stack([rescaled(values) for values in (first - second, diversity, loss)]).sum(dim=0)


def rescaled(values: Tensor) -> Tensor:
    """`values` (N,) rescaled so that the least is 0 and the greatest 1; 0 where all are equal."""
    least, greatest = values.aminmax()
    return (values - least) / (greatest - least).clamp_min(torch.finfo(values.dtype).tiny)


def clustered(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The cluster (N,), below `count`, of each of the points `x` (N,D), by k-means from points drawn at random."""
    order = torch.randperm(len(x), generator=generator, device=x.device)
    centres = x[order[:count]]
    for _ in range(LLOYD):
        # Not index_add: on a GPU its order of summation differs from run to run.
        member = F.one_hot(nearest(x, centres), count).to(x)
        size = member.sum(dim=0)[:, None]
        centres = torch.where(size > 0, member.T @ x / size.clamp_min(1), centres)
    return nearest(x, centres)


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest of `centres` (Z,D) to each of the points `x` (N,D), (N,)."""
    return torch.cat([torch.cdist(part, centres).argmin(dim=1) for part in x.split(8192)])
