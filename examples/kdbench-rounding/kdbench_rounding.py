"""Rounding: the victim answers with few decimals; a classic of Tramer et al., "Stealing Machine Learning Models", 2016."""

from dataclasses import dataclass

from torch import Tensor

from kdbench.api import Context, Count, Defense


@dataclass(frozen=True)
class Rounding(Defense):
    """Rounds each probability to `decimals` decimals and renormalises; the victim is deployed unchanged.

    Departure: a row that rounds to all zeros (many classes, none likely) is answered unrounded.
    """

    decimals: Count = 1

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        p = log_p.exp()
        rounded = p.round(decimals=self.decimals)
        kept = rounded.where(rounded.sum(dim=1, keepdim=True) > 0, p)
        return (kept / kept.sum(dim=1, keepdim=True)).log()
