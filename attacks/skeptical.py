"""Skeptical student: Kundu et al., "Analyzing the Confidentiality of Undistillable Teachers in Knowledge Distillation",
NeurIPS 2021."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.api import (
    Access,
    Attack,
    Context,
    Count,
    KdbenchError,
    Loss,
    Oracle,
    Positive,
    Share,
    draw_seed,
    fit,
    kd,
    kl,
    predict_logits,
    seeded,
    soften,
)

from .averager import labels_or_top


@dataclass(frozen=True)
class Skeptical(Attack):
    """Distils the victim into a shallow head of the student alone; the deep part learns labels and teaches the next head.

    Of a network whose feature maps shrink in stages, h_0 are its own logits. h_1 are those of an auxiliary classifier after
    the last stage but one, h_2 one stage earlier. loc says which of them learns from the victim:
    alpha T^2 KL(softmax(z_t / T) || softmax(h_loc / T)) + (1 - alpha) CE(h_loc)
    + s KL(softmax(h_0 / T) || softmax(h_1 / T)) + (1 - s) CE(h_1) + CE(h_0), s = self_distillation,
    the second KL without T^2 and with a gradient for both. During the first share `delay` of the training the loss is
    CE(h_0) alone: 0.12 is about the 21 of 180 epochs that the averager's authors ran. Only the student is returned. alpha
    and T: the official CIFAR-10 values; loc: that of the CIFAR-100 runs (unofficial CIFAR-10 files have 3). queries: as in
    KD, from the first epoch on.
    Departures: the official code has networks of its own, for ResNets and MobileNetV2. Here any student is instrumented;
    a stage is where its maps keep their size, and a network with too few stages uses its earliest. A head is an attention
    mask, a separable convolution of stride 2 to the width of each later stage, a global average (4x4 there) and a linear
    layer; the order of its layers is ours. During the delay weight decay acts on heads too. Where labels are unknown, the
    oracle's top answer is the label.
    """

    needs: ClassVar[Access] = Access.TOPK
    adaptive: ClassVar[bool] = True

    temperature: Positive = 4.0
    alpha: Share = 0.9
    loc: Count = 2
    self_distillation: Share = 0.3
    delay: Share = 0.12
    queries: Literal["augmented", "once"] = "augmented"

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()
        answers = oracle(ctx.data.x) if self.queries == "once" else oracle
        with seeded(draw_seed(ctx.generator)):  # the initial weights of a layer come from the global generator
            learner = Skeptic(student, self.loc, ctx)
        with learner as skeptic:
            loss = self._delayed(skeptic, self.delay * ctx.recipe.epochs * len(ctx.data))
            fit(skeptic, loss, ctx.data.x, (answers, ctx.data.y), ctx)
        return student

    def loss(self, h: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
        """The loss above for logits `h` (N,H,K), h_0 first, h_1 second, h_loc last, answers (N,K) and labels (N,)."""
        h_0, h_1, h_loc = h[:, 0], h[:, 1], h[:, -1]
        distilled = kl(soften(h_0, self.temperature), (h_1 / self.temperature).log_softmax(dim=1))
        deep = self.self_distillation * distilled + (1 - self.self_distillation) * F.cross_entropy(h_1, y)
        return kd(h_loc, log_p, y, self.temperature, self.alpha) + deep + F.cross_entropy(h_0, y)

    def _delayed(self, skeptic: "Skeptic", images: float) -> Loss:
        """The loss; it is h_0's cross-entropy alone until so many `images` have been seen."""

        def loss(h: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
            log_p, y = target[0], labels_or_top(*target)
            early = int(skeptic.seen) < images
            skeptic.seen += len(y)
            # The heads get a gradient of 0, not None: fused optimisers accept no weights that join later.
            return F.cross_entropy(h[:, 0], y) if early else self.loss(h, log_p, y)

        return loss


class Skeptic(nn.Module):
    """A student with auxiliary classifiers on its maps: images -> logits (N,H,K), its own first. Hooked while it is open."""

    seen: Tensor

    def __init__(self, student: nn.Module, loc: int, ctx: Context) -> None:
        super().__init__()
        ends = stages(student, torch.zeros(2, *ctx.data.shape, device=ctx.device))
        if len(ends) < 2:
            raise KdbenchError(
                "a skeptical student needs a network whose feature maps shrink in stages; this one has fewer than two"
            )
        last = len(ends) - 1
        places = dict.fromkeys((last - 1, max(0, last - loc)))  # of h_1 and h_loc, which may be one
        heads = [classifier([end.channels for end in ends[place:]], ctx.data.classes) for place in places]
        self.student, self.heads = student, nn.ModuleList(heads).to(ctx.device)
        # With the weights, so that a resumed training has it; on the CPU, so that reading it does not wait for a GPU.
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self._taps = [ends[place].name for place in places]
        self._maps: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> "Skeptic":
        self._hooks = [layer.register_forward_hook(self._keep) for layer in self._tapped()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,H,K): h_0, h_1 and, where it is another, h_loc."""
        own = self.student(x)
        maps, self._maps = self._maps, {}
        heads = zip(self.heads, self._tapped(), strict=True)
        return torch.stack([own, *(head(maps[layer]) for head, layer in heads)], dim=1)

    def _tapped(self) -> list[nn.Module]:
        return [self.student.get_submodule(name) for name in self._taps]

    def _keep(self, layer: nn.Module, _: object, maps: Tensor) -> None:
        self._maps[layer] = maps


@dataclass(frozen=True)
class Block:
    """The layer that ends a stage of a network, by name, and how many maps it gives."""

    name: str
    channels: int


def stages(network: nn.Module, x: Tensor) -> list[Block]:
    """The stages of `network`, in which its maps keep their size, in order; x: any images (N,C,H,W).

    They are searched among the children of one module, the one with the most sizes; of equals the outermost. A layer
    without weights, such as a global average, is no stage.
    """
    given = _maps_of(network, x)
    parents = sorted({name.rpartition(".")[0] for name, _ in given}, key=len)
    trunks = [[call for call in given if call[0].rpartition(".")[0] == parent] for parent in parents]
    trunk = max(trunks, key=lambda calls: len({size[2:] for _, size in calls}), default=[])
    runs = [list(run) for _, run in groupby(trunk, key=lambda call: call[1][2:])]
    learnt = [run for run in runs if any(list(network.get_submodule(name).parameters()) for name, _ in run)]
    return [Block(name, size[1]) for name, size in (run[-1] for run in learnt)]


def _maps_of(network: nn.Module, x: Tensor) -> list[tuple[str, torch.Size]]:
    """The layers of `network` that output maps, by name, in the order of their calls, and the shapes (N,C,H,W)."""
    given: list[tuple[str, torch.Size]] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(_layer: nn.Module, _inputs: object, maps: object) -> None:
            if isinstance(maps, Tensor) and maps.ndim == 4:
                given.append((name, maps.shape))

        return note

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in network.named_modules() if name]
    predict_logits(network, x)
    for hook in hooks:
        hook.remove()
    return given


def classifier(widths: Sequence[int], classes: int) -> nn.Sequential:
    """Maps of `widths[0]` channels -> logits: attention, halved once for each further width, averaged."""
    halvings = [layer for inputs, outputs in pairwise(widths) for layer in separable(inputs, outputs, stride=2)]
    average = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(Attention(widths[0]), *halvings, *average, nn.Linear(widths[-1], classes))


class Attention(nn.Module):
    """Maps (N,C,H,W) times a mask in (0,1) of the same shape that is made of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        *second, _ = separable(channels, channels, stride=1)
        self.mask = nn.Sequential(*separable(channels, channels, stride=1), *second, nn.Sigmoid())

    def forward(self, maps: Tensor) -> Tensor:
        """Maps -> maps."""
        masked: Tensor = maps * self.mask(maps)
        return masked


def separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """A 3x3 convolution of each map by itself, a 1x1 one across them, batch norm and ReLU."""
    return [
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
