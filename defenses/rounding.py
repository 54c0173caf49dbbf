"""Rounding: Tramer et al., "Stealing Machine Learning Models via Prediction APIs", 2016, sec. 7."""

from dataclasses import dataclass

from torch import Tensor

from kdbench.api import Context, Count, Defense, keep_top

DIGITS = 7  # decimals that float32 distinguishes below 1; with far more, rounding itself overflows


@dataclass(frozen=True)
class Rounding(Defense):
    """Rounds each probability to `decimals` decimals and renormalises; the victim is deployed unchanged.

    Rounding may make classes equal: the label is then the first of these, and may differ from the victim's. The default
    is that of the Adversarial Robustness Toolbox.
    Departures: the toolbox does not renormalise, but an answer here has to sum to one. A row whose probabilities all
    round to zero (many classes, none likely) is answered by its label alone.
    """

    decimals: Count = 3

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        p = log_p.exp().round(decimals=min(self.decimals, DIGITS))
        total = p.sum(dim=1, keepdim=True)
        return (p / total).log().where(total > 0, keep_top(log_p, 1))
