"""Label only: Tramer et al., "Stealing Machine Learning Models via Prediction APIs", 2016, its first countermeasure."""

from dataclasses import dataclass

from torch import nn

from kdbench.api import Context, Defense, Service, inference, keep_top


@dataclass(frozen=True)
class LabelOnly(Defense):
    """Reveals the most likely class and withholds the others; the victim stays as it is.

    The answer is one-hot: log-probability 0 for the label (of equally likely classes the first), -inf for the rest.
    What every other defense is to be measured against: a thief of soft answers is left with hard ones.
    """

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask = inference(model, ctx)
        return lambda x: keep_top(ask(x), 1)
