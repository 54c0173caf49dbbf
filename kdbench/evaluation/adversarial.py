"""Adversarial robustness: how many images a network still classifies correctly when an attacker perturbs them.

The attacks are torchattacks', with every parameter passed. Whether an example counts is decided here: it must lie in
the ball, be an image, and be misclassified by the network itself. Networks normalise inside, so images, steps and radii
are in pixels, [0,1].
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from kdbench.evaluation.early_stopping import AdversarialAttack, EarlyStopping
from kdbench.evaluation.network import EvaluatedNetwork, frozen_in_eval_mode
from kdbench.evaluation.predictions import predict_labels
from kdbench.game.data import Split
from kdbench.game.fields import Checked, Count, NonNegative, Positive
from kdbench.game.roles import Role, derive, seeded
from kdbench.game.threat import Service

SHORT_STEP = 0.25  # of the radius: after steps of PGD up to this length, misclassified images seldom recover
ROUNDING = 1e-6  # that an example may lie outside its ball
DLR_CLASSES = 4  # the targeted DLR loss of AutoAttack divides by a difference of the four largest logits

AttackName = Literal["fgsm", "pgd", "square", "autoattack"]


@dataclass(frozen=True)
class Robustness(Checked):
    """Which adversarial examples a network is evaluated on, all untargeted, in pixels [0,1].

    level: "none", "fast" (FGSM and PGD), "more" (C&W and Square too), "full" (AutoAttack too: minutes a network). eps:
    radius of the L-inf ball of all attacks but C&W.

    PGD: `pgd_step` is a length of its own. A larger ball needs longer steps (eps / 4), or PGD does not reach its edge.

    C&W (L2): `cw_steps` of Adam at `cw_lr` in atanh space on |d|^2 + cw_c max(z_y - max z_other, -cw_kappa). torchattacks
    does not search for c, so norms are those of this `cw_c`, not the smallest there are. In atanh space a pixel at 0 or
    1 lies at infinity and never moves, so images start `cw_inset` inside (half a grey level is 0.002). From there
    cw_steps times cw_lr bounds the distance; torchattacks' default, 50 steps of 0.01, would hardly move it.

    AutoAttack: the standard four (APGD-CE, targeted APGD-DLR, targeted FAB, Square) with the published settings, each on
    the images that are robust to those before it. torchattacks' own bundle takes 10 steps instead of 100. It is not the
    original code, makes fewer model calls, and can miss an example that the original finds: say so beside published
    numbers.

    Square needs no gradient. It is also run alone, with `square_queries`: where it finds more than PGD, gradients are
    masked. implementation: whose code attacks, for the record.
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


def adversarial_accuracies(
    network: EvaluatedNetwork, data: Split, predicted: Tensor, robustness: Robustness, seed: int
) -> dict[str, float]:
    """The adversarial accuracy of a network whose weights are known, in [0,1], for each attack of the level.

    The names are "robust_" and the attack's. The value is the share of all images that are classified correctly as
    `predicted` (N,) says, and still under attack. AutoAttack is absent below 4 classes, which its loss needs.

    Cross-entropy has no gradient left where logits lie 100 apart, as in networks distilled at a high temperature. FGSM
    and PGD then find nothing, and the other levels tell.

    Attacks run on a folded copy, in batches, and stop early for misclassified images. Verdicts are those of torchattacks
    called plainly on all of `data` after the same seed. Exceptions are rounding, random starts on a GPU, and the rare
    image that a later step of PGD would have made robust again (`EarlyStopping.stopping_early`).
    """
    correct = predicted == data.y
    return {
        f"robust_{name}": int((correct & robust_examples(network, data, robustness, seed, name)).sum()) / len(data)
        for name in _attacks_of(robustness, data.classes)
    }


def robust_examples(
    network: EvaluatedNetwork, data: Split, robustness: Robustness, seed: int, name: AttackName
) -> Tensor:
    """Whether each image of `data` (N,) still gets its label after the attack `name` on all of them."""
    seed = derive(seed, Role.EVALUATION, name)
    attacks = _sequence(name, network.attacked, robustness, data.classes, seed)
    # torchattacks draws from the global generator.
    with frozen_in_eval_mode(network.network), seeded(seed, str(data.x.device)):
        return robust_after(attacks, network.network, data, robustness.eps)


def robust_after(attacks: Iterable[AdversarialAttack], classifier: Service, data: Split, eps: float) -> Tensor:
    """Whether each image of `data` (N,) is robust to all `attacks`, each run on those robust to the ones before it.

    classifier: images (N,C,H,W) -> scores (N,K), which decides whether an example is misclassified.
    """
    active = torch.arange(len(data), device=data.x.device)
    for attack in attacks:
        if len(active):
            active = active[_robust(attack, classifier, data.take(active), eps)]
    return torch.zeros_like(data.y, dtype=torch.bool).index_fill(0, active, True)


def _robust(attack: AdversarialAttack, classifier: Service, data: Split, eps: float) -> Tensor:
    """Whether each image (N,) is robust: an example outside the ball, or that is no image, does not count."""
    x = attack(data.x, data.y)
    near = (x - data.x).abs().flatten(1).amax(dim=1) <= eps + ROUNDING
    return ~(near & are_images(x) & (predict_labels(classifier, x) != data.y))


def are_images(x: Tensor) -> Tensor:
    """Whether each of `x` (N,C,H,W) lies in [0,1], as (N,)."""
    return ((x >= 0) & (x <= 1)).flatten(1).all(dim=1)  # false for NaN


def pgd(network: EarlyStopping, robustness: Robustness) -> AdversarialAttack:
    """PGD of Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018."""
    import torchattacks  # a second, needed nowhere else

    attack: AdversarialAttack = torchattacks.PGD(
        network,
        eps=robustness.eps,
        alpha=robustness.pgd_step,
        steps=robustness.pgd_steps,
        random_start=robustness.pgd_random_start,
    )
    return attack


def _attacks_of(robustness: Robustness, classes: int) -> list[AttackName]:
    names: list[AttackName] = [] if robustness.level == "none" else ["fgsm", "pgd"]
    if robustness.level in ("more", "full"):
        names.append("square")
    if robustness.level == "full" and classes >= DLR_CLASSES:
        names.append("autoattack")
    return names


def _sequence(
    name: AttackName, network: EarlyStopping, robustness: Robustness, classes: int, seed: int
) -> list[AdversarialAttack]:
    """What is run in turn, each on the images that are robust to the attacks before it."""
    if name == "fgsm":
        return [network.in_batches(_fgsm(network, robustness))]
    if name == "pgd":
        stopping = robustness.pgd_step <= SHORT_STEP * robustness.eps
        batched = network.stopping_early if stopping else network.in_batches
        return [batched(pgd(network, robustness))]
    if name == "square":
        return [_square(network, robustness, robustness.square_queries, seed)]
    return _autoattack(network, robustness, classes, seed)


def _fgsm(network: EarlyStopping, robustness: Robustness) -> AdversarialAttack:
    import torchattacks

    attack: AdversarialAttack = torchattacks.FGSM(network, eps=robustness.eps)
    return attack


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
        network.in_batches(boundary),
        _square(network, robustness, robustness.autoattack_queries, seed),
    ]


def _square(network: EarlyStopping, robustness: Robustness, queries: int, seed: int) -> AdversarialAttack:
    import torchattacks

    attack: AdversarialAttack = torchattacks.Square(
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
    return attack
