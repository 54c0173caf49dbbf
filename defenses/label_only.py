"""Label only: Tramer et al., "Stealing Machine Learning Models via Prediction APIs", 2016, its first countermeasure."""

from dataclasses import dataclass

from torch import Tensor

from kdbench.api import Context, Defense, keep_top


@dataclass(frozen=True)
class LabelOnly(Defense):
    """Reveals the most likely class and withholds the others; the victim is deployed unchanged.

    The answer is one-hot: log-probability 0 for the label (of equally likely classes the first), -inf for the rest.
    It is a reference for all other defenses: an attacker of soft answers is left with hard ones.
    """

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return keep_top(log_p, 1)
