"""Every metric that kdbench measures, declared once: boards, records, plots and the glossary take their words from here."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Unit(Enum):
    """What a metric is measured in."""

    FRACTION = "fraction"
    COUNT = "count"
    POINTS = "points"
    NATS = "nats"
    L1 = "L1 distance of probabilities"
    L2 = "L2 norm, pixels in [0,1]"
    GRADIENT = "logits per pixel"


class Better(Enum):
    """Which direction is better for the owner of the victim. The attacker wants the opposite."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True)
class Metric:
    """A number that evaluation measures for a cell.

    name: under which it stands in records. heading: of its column, without the unit. meaning: one sentence, without a full stop.
    """

    name: str
    heading: str
    unit: Unit
    better: Better
    meaning: str


def _of_victim() -> list[Metric]:
    return [
        Metric(
            "victim_acc",
            "Victim accuracy",
            Unit.FRACTION,
            Better.HIGHER,
            "test accuracy of the victim's served answers",
        ),
        Metric(
            "victim_val_acc",
            "Victim validation accuracy",
            Unit.FRACTION,
            Better.HIGHER,
            "validation accuracy of the victim's served answers",
        ),
        Metric(
            "victim_entropy",
            "Answer entropy",
            Unit.NATS,
            Better.NEITHER,
            "mean entropy of the served answers to test images",
        ),
        Metric(
            "victim_distortion",
            "Answer distortion",
            Unit.L1,
            Better.LOWER,
            "mean L1 distance between served answers and the hardened model's own",
        ),
        Metric(
            "victim_consistency",
            "Answer consistency",
            Unit.FRACTION,
            Better.HIGHER,
            "share of repeated queries that get the same answer",
        ),
        *_of_network("victim", "hardened model", Better.HIGHER, Better.LOWER),
    ]


def _of_student() -> list[Metric]:
    return [
        Metric("student_acc", "Student accuracy", Unit.FRACTION, Better.LOWER, "test accuracy of the student"),
        Metric(
            "student_val_acc",
            "Student validation accuracy",
            Unit.FRACTION,
            Better.LOWER,
            "validation accuracy of the student",
        ),
        Metric(
            "fidelity",
            "Fidelity",
            Unit.FRACTION,
            Better.LOWER,
            "share of test images on which student and served victim give the same label",
        ),
        Metric("queries", "Queries", Unit.COUNT, Better.NEITHER, "images that the oracle answered"),
        Metric(
            "transfer",
            "Transfer",
            Unit.FRACTION,
            Better.LOWER,
            "share of adversarial examples made on the student that fool the served victim",
        ),
        *_of_network("student", "student", Better.NEITHER, Better.NEITHER),
    ]


ADVERSARIAL_ATTACKS: Mapping[str, str] = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "square": "Square",
    "autoattack": "AutoAttack",
}
"""Attacks whose adversarial accuracy is measured, by the ending of the metric's name, weakest first."""


def _of_network(side: str, whose: str, robust: Better, fragile: Better) -> list[Metric]:
    """What is measured of a network with its weights known; side: the prefix of the names."""
    accuracies = [
        Metric(
            f"{side}_robust_{name}",
            title,
            Unit.FRACTION,
            robust,
            f"adversarial accuracy of the {whose} under {title}",
        )
        for name, title in ADVERSARIAL_ATTACKS.items()
    ]
    return [
        Metric(
            f"{side}_parameters",
            f"{side.capitalize()} parameters",
            Unit.COUNT,
            Better.NEITHER,
            f"trainable weights of the {whose}",
        ),
        *accuracies,
        Metric(
            f"{side}_cw_success",
            "C&W success",
            Unit.FRACTION,
            fragile,
            f"share of the correctly classified images on which C&W (L2) changes the label that the {whose} gives",
        ),
        Metric(
            f"{side}_cw_l2",
            "C&W L2",
            Unit.L2,
            robust,
            f"mean L2 norm of the successful C&W perturbations of the {whose}",
        ),
        Metric(
            f"{side}_sensitivity",
            "Sensitivity",
            Unit.GRADIENT,
            Better.NEITHER,
            f"mean |d(sum of logits)/d(pixel)| of the {whose} over the test images",
        ),
    ]


METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*_of_victim(), *_of_student())}
"""All metrics by name."""
