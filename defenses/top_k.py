"""Top-k: Tramer et al., "Stealing Machine Learning Models via Prediction APIs", 2016; the usual limit of public services."""

from dataclasses import dataclass

from torch import nn

from kdbench.api import Context, Count, Defense, Service, inference, keep_top


@dataclass(frozen=True)
class TopK(Defense):
    """Reveals the `k` most likely classes, renormalised, and withholds the others; the victim stays as it is.

    The same answers as Stingy's, which counts its classes as a share; of k or fewer classes all are revealed. k = 1 is
    label only. Departure: services as they are in use do not renormalise, but an answer here has to sum to one. The
    default is our choice.
    """

    k: Count = 3

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask = inference(model, ctx)
        return lambda x: keep_top(ask(x), self.k)
