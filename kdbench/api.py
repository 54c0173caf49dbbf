"""The one door for authors of methods: all that a defense, an attack, a network or a data set imports of kdbench."""

from kdbench.errors import Diverged, KdbenchError, Refused
from kdbench.game.data import UNKNOWN, Dataset, Images, Owned, Split
from kdbench.game.fields import Count, Fraction, NonNegative, Positive, Share, Whole
from kdbench.game.folding import folded
from kdbench.game.losses import jensen_shannon, kd, kd_term, kl, soft_cross_entropy, soften
from kdbench.game.methods import Attack, Context, Defense, Log, Precision, Recipe, draw_seed, seeded
from kdbench.game.threat import Answers, Oracle, Service, ThreatModel, keep_top
from kdbench.game.training import fit, frozen, infer
from kdbench.game.work import Ask, Loss, Target, lay_out, lowered

__all__ = [
    "UNKNOWN", "Answers", "Ask", "Attack", "Context", "Count", "Dataset", "Defense", "Diverged", "Fraction", "Images",
    "KdbenchError", "Log", "Loss", "NonNegative", "Oracle", "Owned", "Positive", "Precision", "Recipe", "Refused",
    "Service", "Share", "Split", "Target", "ThreatModel", "Whole", "draw_seed", "fit", "folded", "frozen",
    "infer", "jensen_shannon", "kd", "kd_term", "keep_top", "kl", "lay_out", "lowered", "seeded", "soft_cross_entropy", "soften",
]  # fmt: skip
