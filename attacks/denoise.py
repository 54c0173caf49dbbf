"""D-DAE: Chen et al., "D-DAE: Defense-Penetrating Model Extraction Attacks", IEEE S&P 2023, as ModelGuard (Tang et al.,
USENIX Security 2024) plays it: an adaptive thief who learns to undo what the answers went through."""

import math
from collections.abc import Callable
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
    Fraction,
    KdbenchError,
    Oracle,
    Positive,
    QueryFunction,
    Scenario,
    Share,
    draw_seed,
    fit,
    inference,
    keep_top,
    kl,
    predict_logits,
    seeded,
    soft_cross_entropy,
)

from ._transforms import noisy, reverse_sigmoid, rounded
from .averager import classes_of
from .kd import kd_loss

ADAM = {"optimizer": "adam", "lr": 3e-3, "weight_decay": 0.0, "schedule": "cosine", "crop": 0, "flip": False}


@dataclass(frozen=True)
class Denoise(Attack):
    """Simulates the owner's output transform on networks of its own, learns to undo it, and plays KD with denoised answers.

    Each of `shadows` (registered networks, "" for the student's own) learns the thief's images alone; what they say of
    these are clean answers, and what `guess` makes of them perturbed ones. An MLP with two hidden layers of `width` (as
    in ModelGuard: 64 for 10 classes, 512 for 100) learns the way back in `epochs`, by soft cross-entropy. guess: one
    transform, at the strength that decimals, beta and gamma, sigma, or k say, or the "mixture" of all; a thief who knows
    the defense gives its settings. The grant is no guess: where the oracle truncates answers to the top k, the simulated
    ones are truncated as well.
    Defaults: KD's temperature and alpha; the strengths of the defenses of those names. queries: as in KD. Written down:
    perturbed_kl and denoised_kl, of simulated answers from the clean ones.
    Departures: one shadow, where ModelGuard has 20, and no network that guesses the transform; `examples` clean answers
    are drawn from the shadows', each with its classes in a random order, for the transforms treat classes alike, and go
    through every transform; the MLP reads standardised log-probabilities (below `floor` they count as it), where
    ModelGuard's reads probabilities, and learns by Adam at 3e-3 with a cosine, in the thief's batches. Where labels are
    unknown, shadows learn the oracle's top answers to the images as they are, which are asked for once.
    """

    needs: ClassVar[Access] = Access.TOPK
    adaptive: ClassVar[bool] = True

    guess: Literal["mixture", "rounding", "reverse-sigmoid", "noise", "top-k"] = "mixture"
    decimals: Count = 3
    beta: Positive = 1.0
    gamma: Positive = 0.1
    sigma: Positive = 0.1
    k: Count = 3
    shadows: tuple[str, ...] = ("",)
    width: Count = 64
    examples: Count = 10_000
    epochs: Count = 30
    floor: Fraction = 1e-7
    temperature: Positive = 4.0
    alpha: Share = 0.9
    queries: Literal["augmented", "once"] = "augmented"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shadows:
            raise KdbenchError("Denoise.shadows must name at least one network: its answers are what is simulated on.")

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()  # before the shadows: it starts from the same weights as the student of KD
        y, answers = ctx.data.y, None
        if self.queries == "once" or not ctx.data.labelled:
            answers = oracle(ctx.data.x)
            y = classes_of(answers, y)
        denoise = self._denoiser(self._clean(y, ctx), oracle.scenario, ctx)
        told = denoise(answers) if answers is not None and self.queries == "once" else lambda x: denoise(oracle(x))
        fit(student, kd_loss(self.temperature, self.alpha, ctx.data.labelled), ctx.data.x, (told, ctx.data.y), ctx)
        return student

    def networks(self) -> tuple[str, ...]:
        return tuple(name for name in self.shadows if name)

    def simulated(self, clean: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Log-probabilities (N,K) as each transform of `guess` would give them for the `clean` ones (N,K)."""
        transforms: dict[str, Callable[[], Tensor]] = {
            "rounding": lambda: rounded(clean, self.decimals),
            "reverse-sigmoid": lambda: reverse_sigmoid(clean, self.beta, self.gamma),
            "noise": lambda: noisy(clean, self.sigma, generator),
            "top-k": lambda: keep_top(clean, self.k),
        }
        return [make() for name, make in transforms.items() if self.guess in (name, "mixture")]

    def clipped(self, log_p: Tensor) -> Tensor:
        """Log-probabilities of which none is below the floor."""
        return log_p.clamp_min(math.log(self.floor))

    def drawn(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """`examples` of the `clean` answers (N,K), each with its classes in a random order."""
        row = torch.randint(len(clean), (self.examples,), generator=generator, device=clean.device)
        order = torch.rand((self.examples, clean.shape[1]), generator=generator, device=clean.device).argsort(dim=1)
        return clean[row].gather(1, order)

    def _clean(self, y: Tensor, ctx: Context) -> Tensor:
        """What all shadows, taught the labels `y` (N,), say of the thief's images: log-probabilities (SN,K)."""
        said = []
        for shadow in [ctx.new_student(name or None) for name in self.shadows]:
            fit(shadow, F.cross_entropy, ctx.data.x, y, ctx)
            ask = inference(shadow, ctx)
            said += [ask(part).log_softmax(dim=1) for part in ctx.data.x.split(1024)]
        return torch.cat(said)

    def _denoiser(self, clean: Tensor, scenario: Scenario, ctx: Context) -> QueryFunction:
        """The MLP, trained: perturbed log-probabilities (N,K) -> clean ones."""
        examples = self.drawn(clean, ctx.generator)
        given = [granted(log_p, scenario) for log_p in self.simulated(examples, ctx.generator)]
        perturbed, target = self.clipped(torch.cat(given)), examples.repeat(len(given), 1)
        mean, spread = perturbed.mean(), perturbed.std().clamp_min(self.floor)

        def vectors(log_p: Tensor) -> Tensor:
            return ((self.clipped(log_p) - mean) / spread)[..., None, None]

        def denoise(log_p: Tensor) -> Tensor:
            return predict_logits(mlp, vectors(log_p)).float().log_softmax(dim=1)

        with seeded(draw_seed(ctx.generator)):  # what a layer starts from comes out of the global generator
            mlp = perceptron(clean.shape[1], self.width).to(ctx.device)
        fit(mlp, soft_cross_entropy, vectors(perturbed), target.exp(), ctx.training(epochs=self.epochs, **ADAM))
        for name, log_p in (("perturbed_kl", perturbed), ("denoised_kl", denoise(perturbed))):
            ctx.log(name, float(kl(target.exp(), log_p.log_softmax(dim=1))))
        return denoise


def granted(log_p: Tensor, scenario: Scenario) -> Tensor:
    """Simulated answers (N,K) as far as an oracle under `scenario` reveals them."""
    return keep_top(log_p, scenario.topk) if scenario.access is Access.TOPK else log_p


def perceptron(classes: int, width: int) -> nn.Sequential:
    """(N,K,1,1) -> logits (N,K), over two hidden layers."""
    hidden = [nn.Linear(classes, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))
