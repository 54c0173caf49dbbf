"""Top-k: Tramer et al., "Stealing Machine Learning Models via Prediction APIs", 2016; the usual limit of public services."""

from dataclasses import dataclass

from torch import Tensor

from kdbench.api import Context, Count, Defense, keep_top


@dataclass(frozen=True)
class TopK(Defense):
    """Reveals the `k` most likely classes, renormalised, and withholds the others; the victim is deployed unchanged.

    The same answers as Stingy's, which counts its classes as a ratio. Of k or fewer classes all are revealed; k = 1 is
    label only. The default is our choice.
    Departure: services as they are in use do not renormalise, but an answer here has to sum to one.
    """

    k: Count = 3

    def perturb(self, log_p: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return keep_top(log_p, self.k)
