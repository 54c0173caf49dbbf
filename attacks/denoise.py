"""D-DAE: Chen et al., "D-DAE: Defense-Penetrating Model Extraction Attacks", IEEE S&P 2023, as ModelGuard (Tang et al.,
USENIX Security 2024) runs it: an adaptive attacker that learns to undo the perturbation of the answers."""

import json
import math
from collections.abc import Sequence
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
    Defense,
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
    registered_defense,
    seeded,
    soft_cross_entropy,
    with_auxiliary,
)

from .averager import labels_or_top
from .kd import kd_loss

ADAM = {"optimizer": "adam", "lr": 3e-3, "weight_decay": 0.0, "schedule": "cosine", "crop": 0, "flip": False}
CHUNK = 1024  # images answered at once; bounds memory
JITTER = 1 / 510  # half a grey level: another image to a defense that keys its noise to the bits of an image


@dataclass(frozen=True)
class Denoise(Attack):
    """Simulates the defense on networks of its own, learns to undo it, and runs KD with denoised answers.

    Each of `shadows` (registered networks, "" for the student's own) learns the attacker's images. Its answers to them
    are clean, and each defense of `guess` makes perturbed ones of them. An MLP with two hidden layers of `width` (as in
    ModelGuard: 64 for 10 classes, 512 for 100) learns the way back in `epochs`, by soft cross-entropy.
    guess: registered defenses that act on answers, each "NAME" or "NAME:field=value,field=value". An attacker that knows
    the defense gives its fields; the default is a mixture. What a defense does at training time is not simulated, its
    auxiliary model is trained on the shadow. The access level is no guess: where the oracle truncates answers to the top
    k, the simulated ones are truncated as well.

    Defaults: KD's temperature and alpha; the strengths of the defenses of those names. queries: as in KD. Written down:
    perturbed_kl and denoised_kl, of simulated answers from the clean ones.
    Departures: there is one shadow, where ModelGuard has 20, and no network that guesses the defense. `examples` clean
    answers are drawn from the shadows', and go through every defense of `guess`. Clean and perturbed answer get their
    classes in one random order, for most perturbations treat classes alike. The MLP reads standardised log-probabilities
    (below `floor` they count as it), where ModelGuard's reads probabilities. It learns by Adam at 3e-3 with a cosine
    schedule, in the attacker's batch size. Where labels are unknown, shadows learn the oracle's top answers to the images
    without augmentation, which are asked for once.
    """

    needs: ClassVar[Access] = Access.TOPK
    adaptive: ClassVar[bool] = True

    guess: tuple[str, ...] = ("rounding", "reverse-sigmoid", "gaussian-noise", "top-k")
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
        if not self.guess:
            raise KdbenchError("Denoise.guess must name at least one defense: it is what the attack learns to undo.")
        for text in self.guess:
            guessed(text)  # a misspelt one is found before any training

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()  # before the shadows: it starts from the same weights as the student of KD
        y, answers = ctx.data.y, None
        if self.queries == "once" or not ctx.data.labelled:
            answers = oracle(ctx.data.x)
            y = labels_or_top(answers, y)
        examples = self._examples(self._shadows(y, ctx), ctx)
        denoise = self._denoiser(examples.truncated(oracle.scenario), ctx)
        told = denoise(answers) if answers is not None and self.queries == "once" else lambda x: denoise(oracle(x))
        fit(student, kd_loss(self.temperature, self.alpha, ctx.data.labelled), ctx.data.x, (told, ctx.data.y), ctx)
        return student

    def networks(self) -> tuple[str, ...]:
        return tuple(name for name in self.shadows if name)

    def simulated_defenses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text.partition(":")[0] for text in self.guess))

    def clipped(self, log_p: Tensor) -> Tensor:
        """Log-probabilities of which none is below the floor."""
        return log_p.clamp_min(math.log(self.floor))

    def _shadows(self, y: Tensor, ctx: Context) -> list[nn.Module]:
        """Networks taught the labels `y` (N,) of the attacker's images."""
        shadows = [ctx.new_student(name or None) for name in self.shadows]
        for shadow in shadows:
            fit(shadow, F.cross_entropy, ctx.data.x, y, ctx)
        return shadows

    def _examples(self, shadows: Sequence[nn.Module], ctx: Context) -> "Examples":
        """Answers of the shadows, drawn, and what each defense of `guess` makes of them, classes in a random order."""
        asks = [inference(shadow, ctx) for shadow in shadows]
        clean = torch.cat([ask(part).log_softmax(dim=1) for ask in asks for part in ctx.data.x.split(CHUNK)])
        row = torch.randint(len(clean), (self.examples,), generator=ctx.generator, device=clean.device)
        size = (self.examples, clean.shape[1])
        order = torch.rand(size, generator=ctx.generator, device=clean.device).argsort(dim=1)
        given = []
        for text in self.guess:
            defense = guessed(text)
            given.append(simulated(defense, clean[row], row % len(ctx.data), with_auxiliary(defense, shadows[0], ctx)))
        return Examples(clean[row].gather(1, order), [log_p.gather(1, order) for log_p in given])

    def _denoiser(self, examples: "Examples", ctx: Context) -> QueryFunction:
        """The MLP, trained: perturbed log-probabilities (N,K) -> clean ones."""
        perturbed = self.clipped(torch.cat(examples.perturbed))
        target = examples.clean.repeat(len(examples.perturbed), 1)
        mean, spread = perturbed.mean(), perturbed.std().clamp_min(self.floor)

        def vectors(log_p: Tensor) -> Tensor:
            return ((self.clipped(log_p) - mean) / spread)[..., None, None]

        def denoise(log_p: Tensor) -> Tensor:
            return predict_logits(mlp, vectors(log_p)).float().log_softmax(dim=1)

        with seeded(draw_seed(ctx.generator)):  # the initial weights of a layer come from the global generator
            mlp = perceptron(target.shape[1], self.width).to(ctx.device)
        fit(mlp, soft_cross_entropy, vectors(perturbed), target.exp(), ctx.training(epochs=self.epochs, **ADAM))
        for name, log_p in (("perturbed_kl", perturbed), ("denoised_kl", denoise(perturbed))):
            ctx.log(name, float(kl(target.exp(), log_p.log_softmax(dim=1))))
        return denoise


@dataclass(frozen=True)
class Examples:
    """Log-probabilities (M,K): clean ones, and as each of the simulated defenses perturbs them."""

    clean: Tensor
    perturbed: list[Tensor]

    def truncated(self, scenario: Scenario) -> "Examples":
        """The same with the perturbed ones as an oracle under `scenario` reveals them."""
        if scenario.access is not Access.TOPK:
            return self
        return Examples(self.clean, [keep_top(log_p, scenario.topk) for log_p in self.perturbed])


def guessed(text: str) -> Defense:
    """The defense that `text` says, "NAME" or "NAME:field=value,field=value".

    Raises `KdbenchError` for an unknown name or field, and for a defense that does not perturb a batch of answers.
    """
    name, _, settings = text.partition(":")
    pairs = (setting.partition("=") for setting in settings.split(",") if setting)
    defense = registered_defense(name, {field.strip(): _value(value) for field, _, value in pairs})
    if type(defense).perturb is Defense.perturb:
        raise KdbenchError(f"denoise cannot simulate '{name}': it does not act on a batch of answers by itself.")
    return defense


def _value(text: str) -> Any:
    """A number or a truth value as JSON writes it; anything else is a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()


def simulated(defense: Defense, clean: Tensor, image: Tensor, ctx: Context) -> Tensor:
    """What `defense` answers (M,K) where its model says `clean` (M,K) of the attacker's images at `image` (M,).

    Images are moved by less than a grey level, so that noise which depends on the bits of an image differs each time.
    """
    answers = []
    for log_p, index in zip(clean.split(CHUNK), image.split(CHUNK), strict=True):
        x = ctx.data.x[index]
        moved = x + JITTER * (2 * torch.rand(x.shape, generator=ctx.generator, device=x.device) - 1)
        with torch.no_grad():
            answers.append(defense.perturb(log_p, moved.clamp(0, 1), ctx))
    return torch.cat(answers)


def perceptron(classes: int, width: int) -> nn.Sequential:
    """(N,K,1,1) -> logits (N,K), over two hidden layers."""
    hidden = [nn.Linear(classes, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))
