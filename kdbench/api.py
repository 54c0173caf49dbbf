"""The door for authors of methods: all that a defense, an attack, a network or a data set imports of kdbench."""

from collections.abc import Mapping
from typing import Any

from kdbench import registry
from kdbench.errors import Diverged, KdbenchError, Refused
from kdbench.game.data import UNKNOWN, Dataset, DataSubset, Images, Split
from kdbench.game.fields import Count, Fraction, NonNegative, Positive, Share, Whole, build
from kdbench.game.losses import jensen_shannon, kd, kd_term, kl, soft_cross_entropy, soften
from kdbench.game.methods import (
    Attack,
    Checkpoint,
    Context,
    Defense,
    Log,
    Precision,
    Recipe,
    with_auxiliary,
)
from kdbench.game.roles import draw_seed, seeded
from kdbench.game.threat import Access, Oracle, Scenario, Service, keep_top
from kdbench.training.fit import fit, forward, frozen_copy, inference, predict_logits
from kdbench.training.loop import Loss, QueryFunction, Target, restore

__all__ = [
    "UNKNOWN",
    "Access",
    "Attack",
    "Checkpoint",
    "Context",
    "Count",
    "DataSubset",
    "Dataset",
    "Defense",
    "Diverged",
    "Fraction",
    "Images",
    "KdbenchError",
    "Log",
    "Loss",
    "NonNegative",
    "Oracle",
    "Positive",
    "Precision",
    "QueryFunction",
    "Recipe",
    "Refused",
    "Scenario",
    "Service",
    "Share",
    "Split",
    "Target",
    "Whole",
    "draw_seed",
    "fit",
    "forward",
    "frozen_copy",
    "inference",
    "jensen_shannon",
    "kd",
    "kd_term",
    "keep_top",
    "kl",
    "predict_logits",
    "registered_defense",
    "restore",
    "seeded",
    "soft_cross_entropy",
    "soften",
    "with_auxiliary",
]  # fmt: skip


def registered_defense(name: str, fields: Mapping[str, Any]) -> Defense:
    """The registered defense `name` with `fields` as a suite file has them, for an attack that simulates it.

    Raises `KdbenchError` for an unknown name, with the nearest known one, and for an unknown or ill-typed field.
    """
    defense: Defense = build(registry.load("defense", name), fields, f"defense.{name}")
    return defense
