"""Evasion: adversarial examples against a network, how far they carry over, and how much its logits hang on the pixels.

The attacks are torchattacks', with every parameter passed; what they return is judged here, never by them. Networks
normalise inside, so images, steps and radii are in pixels, [0,1].
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from kdbench.evaluation.early_stopping import AdversarialAttack, EarlyStopping, rows
from kdbench.game.data import Split
from kdbench.game.fields import Checked, Count, NonNegative, Positive
from kdbench.game.methods import derive, seeded
from kdbench.game.threat import Service
from kdbench.training.bn_folding import folded

BATCH = 512  # images asked at once; part of the protocol: C&W's early stop depends on it
SHORT = 0.25  # steps of PGD up to this share of the radius seldom bring back an image that they have fooled
SLACK = 1e-6  # rounding that an example may lie outside its ball
DLR_CLASSES = 4  # the targeted DLR loss of AutoAttack divides by a difference of the four largest logits


@dataclass(frozen=True)
class Robustness(Checked):
    """Which adversarial examples a network is judged by, all untargeted, in pixels [0,1].

    level: "none", "fast" (FGSM and PGD), "more" (C&W and Square too), "full" (AutoAttack too: minutes a network). eps:
    radius of the L-inf ball of all but C&W.
    pgd_step is a length of its own: a wider ball wants longer steps (eps / 4), or PGD stays short of its edge.
    C&W (L2): `cw_steps` of Adam at `cw_lr` in atanh space on |d|^2 + cw_c max(z_y - max z_other, -cw_kappa), for this
    one c: torchattacks does not search for it, so norms are those of this c and not the smallest there are. In atanh
    space a pixel at 0 or 1 lies at infinity and never moves: images start `cw_inset` inside (half a grey level is
    0.002). From there cw_steps times cw_lr bounds its way; the library's 50 steps of 0.01 would leave it where it is.
    AutoAttack: the standard four (APGD-CE, targeted APGD-DLR, targeted FAB, Square) with the published settings, each
    on what the ones before it could not fell; torchattacks' own bundle takes 10 steps instead of 100. It is not the
    original code, makes fewer model calls, and can leave an image standing that the original fells: say so beside
    published figures. Square, which needs no gradient, is also tried by itself, with `square_queries`: where it does
    better than PGD, gradients are masked. implementation: whose code attacks, for the record.
    """

    level: Literal["none", "fast", "more", "full"] = "fast"
    eps: Positive = 8 / 255
    pgd_step: Positive = 2 / 255
    pgd_steps: Count = 20
    pgd_random_start: bool = True
    cw_c: Positive = 1.0
    cw_kappa: NonNegative = 0.0
    cw_steps: Count = 200
    cw_lr: Positive = 0.05
    cw_inset: Annotated[float, Gt(0), Lt(0.5)] = 1e-3
    autoattack_steps: Count = 100
    autoattack_targets: Count = 9
    autoattack_queries: Count = 5000
    square_queries: Count = 1000
    implementation: Literal["torchattacks"] = "torchattacks"


def adversarial(
    model: nn.Module, data: Split, robustness: Robustness, seed: int, *, predicted: Tensor | None = None
) -> dict[str, float]:
    """How `model` (images -> logits) bears up under attack with its weights known, by name of metric; {} at level none.

    adv_fgsm, adv_pgd, adv_square, adv_autoattack: images classified rightly under attack / all images; what is wrong
    from the start counts as fooled. cw_success: share of the rightly classified images that C&W fells. cw_l2: mean L2
    norm of those perturbations. A key is absent where there is nothing to tell: AutoAttack below 4 classes (its loss
    needs them), the norm when C&W fells nothing, both of C&W when no image is classified rightly. predicted: the
    labels (N,) that the model gives to `data`, where they are known. Cross-entropy has no gradient left where logits
    lie 100 apart (nets distilled at a high temperature): FGSM and PGD then find nothing, and the other levels tell.

    Attacks run on a folded copy, in batches, and leave images alone that have clearly fallen. Verdicts are those of
    torchattacks called plainly on all of `data` after the same seed, but for rounding, for random starts on a GPU, and
    for the rare image that a later step of PGD would have brought back (`EarlyStopping.stopping_early`).
    """
    if robustness.level == "none":
        return {}
    with frozen_in_eval_mode(model):
        right = (labels(model, data.x) if predicted is None else predicted) == data.y
        names = ["adv_fgsm", "adv_pgd"]
        if robustness.level != "fast":
            names.append("adv_square")
        if robustness.level == "full" and data.classes >= DLR_CLASSES:
            names.append("adv_autoattack")
        scores = {
            name: int((right & robust_examples(model, data, robustness, seed, name)).sum()) / len(data)
            for name in names
        }
        return scores | (_carlini_wagner(model, _where(right, data), robustness) if robustness.level != "fast" else {})


def robust_examples(model: nn.Module, data: Split, robustness: Robustness, seed: int, name: str) -> Tensor:
    """Whether each image of `data` (N,) is still given its label after the attack "adv_fgsm", "adv_pgd", "adv_square"
    or "adv_autoattack" on all of them. Attacks work on a folded copy; `model` itself is the judge.
    """
    evades = _trial(name, _spared(model, data), robustness, data.classes, derive(seed, name))
    with (
        frozen_in_eval_mode(model),
        seeded(derive(seed, name), str(data.x.device)),
    ):  # torchattacks draws from the global generator
        left = _left(evades, model, data, robustness.eps)
    return torch.zeros_like(data.y, dtype=torch.bool).index_fill(0, left, True)


def transfer(
    student: nn.Module,
    service: Service,
    data: Split,
    robustness: Robustness,
    seed: int,
    *,
    served: Tensor | None = None,
) -> float:
    """Share of PGD examples made on `student` that the served victim gets wrong, of images that it classifies rightly.

    served: the labels (N,) that the service gives to `data`, where it has been asked. 0 when the victim is never right.
    """
    served = labels(service, data.x) if served is None else served
    right = _where(served == data.y, data)
    network = _spared(student, data)
    with seeded(derive(seed, "transfer"), str(data.x.device)):
        # Examples that stop where they first fool the student would carry over less.
        left = _left([network.whole(_pgd(network, robustness))], service, right, robustness.eps)
    return (len(right) - len(left)) / len(right) if len(right) else 0.0


def sensitivity(model: nn.Module, x: Tensor) -> float:
    """Mean over images and pixels of |d(sum of all logits)/d(pixel)| at T = 1, for images `x` (N,C,H,W) in [0,1].

    The measure of Mandal & Gao 2023 (arXiv 2305.08076), as their code has it: of the logits, not of a loss.
    """
    network = folded(model, x)
    return math.fsum(float(_slope(network, part).abs().sum()) for part in x.split(rows(x))) / x.numel()


def labels(answer: Service, x: Tensor) -> Tensor:
    """The label (N,) of the largest of the answers to each of `x` (N,C,H,W), by a service or a network."""
    with torch.no_grad():
        return torch.cat([answer(part).argmax(dim=1) for part in torch.split(x, BATCH)])


@contextmanager
def frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; afterwards every module and parameter as it was found."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _spared(model: nn.Module, data: Split) -> EarlyStopping:
    """The network as attacks see it; they are judged by itself."""
    return EarlyStopping(folded(model, data.x), rows(data.x))


def _trial(
    name: str, network: EarlyStopping, robustness: Robustness, classes: int, seed: int
) -> Sequence[AdversarialAttack]:
    """What is tried in turn, each on what the ones before it could not fell."""
    if name == "adv_fgsm":
        return [network.whole(_fgsm(network, robustness))]
    if name == "adv_pgd":
        drop_order = network.stopping_early if robustness.pgd_step <= SHORT * robustness.eps else network.whole
        return [drop_order(_pgd(network, robustness))]
    if name == "adv_square":
        return [_square(network, robustness, robustness.square_queries, seed)]
    return _autoattack(network, robustness, classes, seed)


def _left(evades: Sequence[AdversarialAttack], judge: Service, data: Split, eps: float) -> Tensor:
    """Which of `data` (M,) stand after all of `evades`, each tried on what the ones before it could not fell."""
    left = torch.arange(len(data), device=data.x.device)
    for evade in evades:
        if len(left):
            left = left[_stand(evade, judge, data.take(left), eps)]
    return left


def _stand(evade: AdversarialAttack, judge: Service, data: Split, eps: float) -> Tensor:
    """Whether each image (N,) stands: an example outside the ball, or that is no image, fells nothing."""
    x = evade(data.x, data.y)
    near = (x - data.x).abs().flatten(1).amax(dim=1) <= eps + SLACK
    return ~(near & _are_images(x) & (labels(judge, x) != data.y))


def _are_images(x: Tensor) -> Tensor:
    return ((x >= 0) & (x <= 1)).flatten(1).all(dim=1)  # false for NaN


def _where(chosen: Tensor, data: Split) -> Split:
    return data.take(chosen.nonzero().flatten())


def _fgsm(model: EarlyStopping, robustness: Robustness) -> AdversarialAttack:
    import torchattacks  # a second, needed nowhere else

    evade: AdversarialAttack = torchattacks.FGSM(model, eps=robustness.eps)
    return evade


def _pgd(model: EarlyStopping, robustness: Robustness) -> AdversarialAttack:
    import torchattacks

    evade: AdversarialAttack = torchattacks.PGD(
        model,
        eps=robustness.eps,
        alpha=robustness.pgd_step,
        steps=robustness.pgd_steps,
        random_start=robustness.pgd_random_start,
    )
    return evade


def _autoattack(network: EarlyStopping, robustness: Robustness, classes: int, seed: int) -> list[AdversarialAttack]:
    """The standard version for L-inf of Croce & Hein, "Reliable evaluation of adversarial robustness …", ICML 2020."""
    import torchattacks

    common = {"norm": "Linf", "eps": robustness.eps, "n_restarts": 1, "seed": seed, "verbose": False}
    steps = common | {"steps": robustness.autoattack_steps}
    some = min(robustness.autoattack_targets + 1, classes)  # torchattacks takes the targets' number plus one
    cross_entropy = torchattacks.APGD(network, **steps, loss="ce", eot_iter=1, rho=0.75)
    targeted = torchattacks.APGDT(network, **steps, eot_iter=1, rho=0.75, n_classes=some)
    boundary = torchattacks.FAB(
        network, **steps, alpha_max=0.1, eta=1.05, beta=0.9, multi_targeted=True, n_classes=some
    )
    return [
        network.stopping_runs_early(cross_entropy),
        network.stopping_runs_early(targeted),
        network.whole(boundary),
        _square(network, robustness, robustness.autoattack_queries, seed),
    ]


def _square(network: EarlyStopping, robustness: Robustness, queries: int, seed: int) -> AdversarialAttack:
    import torchattacks

    evade: AdversarialAttack = torchattacks.Square(
        network,
        norm="Linf",
        eps=robustness.eps,
        n_queries=queries,
        n_restarts=1,
        p_init=0.8,
        loss="margin",
        resc_schedule=False,
        seed=seed,
        verbose=False,
    )
    return evade


def _carlini_wagner(model: nn.Module, right: Split, robustness: Robustness) -> dict[str, float]:
    """cw_success and cw_l2 (see `adversarial`); norms are measured from the images, not from their insets."""
    import torchattacks

    if not len(right):
        return {}
    attack = torchattacks.CW(
        _AboveZero(_spared(model, right)),
        c=robustness.cw_c,
        kappa=robustness.cw_kappa,
        steps=robustness.cw_steps,
        lr=robustness.cw_lr,
    )
    found = []
    for x, y in zip(torch.split(right.x, BATCH), torch.split(right.y, BATCH), strict=True):
        moved = attack(x.clamp(robustness.cw_inset, 1 - robustness.cw_inset), y)
        misclassified = _are_images(moved) & (labels(model, moved) != y)
        found.append((moved - x)[misclassified].flatten(1).norm(dim=1))
    norms = torch.cat(found)
    success = {"cw_success": len(norms) / len(right)}
    return success | {"cw_l2": float(norms.mean())} if len(norms) else success


class _AboveZero(nn.Module):
    """The same network, each image's logits shifted so that the least is 1.

    torchattacks' C&W hides a class by multiplying its logit with 0, which hides nothing among negative logits: a net
    whose logits are all negative (log-probabilities, say) would seem to withstand it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()  # torchattacks would put the net into training mode after the attack, as it found its wrapper

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) -> logits (N,K), the least of each row 1."""
        z: Tensor = self.model(x)
        return z - z.detach().amin(dim=1, keepdim=True) + 1


def _slope(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model(x).sum(), x)[0]
