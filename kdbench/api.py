"""The one door for authors of methods: all that a defense, an attack, a network or a data set imports of kdbench."""

from kdbench.errors import Diverged, KdbenchError, Refused
from kdbench.game.data import UNKNOWN, Dataset, DataSubset, Images, Split
from kdbench.game.fields import Count, Fraction, NonNegative, Positive, Share, Whole
from kdbench.game.losses import jensen_shannon, kd, kd_term, kl, soft_cross_entropy, soften
from kdbench.game.methods import Attack, Context, Defense, Log, Precision, Recipe, draw_seed, seeded
from kdbench.game.threat import Access, Oracle, Scenario, Service, keep_top
from kdbench.training.bn_folding import folded
from kdbench.training.fit import fit, inference, predict_logits
from kdbench.training.loop import Loss, QueryFunction, Target, autocast, match_memory_format

__all__ = [
    "UNKNOWN",
    "Access",
    "Attack",
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
    "autocast",
    "draw_seed",
    "fit",
    "folded",
    "inference",
    "jensen_shannon",
    "kd",
    "kd_term",
    "keep_top",
    "kl",
    "match_memory_format",
    "predict_logits",
    "seeded",
    "soft_cross_entropy",
    "soften",
]  # fmt: skip
