"""Rounding: Tramer et al., "Stealing Machine Learning Models via Prediction APIs", 2016, sec. 7."""

from dataclasses import dataclass

from torch import Tensor, nn

from kdbench.api import Context, Count, Defense, Service, inference, keep_top

DIGITS = 7  # decimals that float32 tells apart below 1; with far more, rounding itself overflows


@dataclass(frozen=True)
class Rounding(Defense):
    """Rounds each probability to `decimals` decimals and renormalises; the victim stays as it is.

    Rounding may make classes equal: the label is then the first of these, and need not be the victim's. Default: that
    of the Adversarial Robustness Toolbox. Departures: the toolbox does not renormalise, but an answer here has to sum
    to one; and a row that rounds to zeros alone (many classes, none likely) is answered by its label alone.
    """

    decimals: Count = 3

    def serve(self, model: nn.Module, ctx: Context) -> Service:
        ask = inference(model, ctx)
        return lambda x: self.rounded(ask(x).log_softmax(dim=1))

    def rounded(self, log_p: Tensor) -> Tensor:
        """Log-probabilities (N,K) -> those of the rounded probabilities, -inf where these are 0."""
        p = log_p.exp().round(decimals=min(self.decimals, DIGITS))
        total = p.sum(dim=1, keepdim=True)
        return (p / total).log().where(total > 0, keep_top(log_p, 1))
