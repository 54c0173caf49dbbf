"""A network under evaluation: in eval mode, with its weights frozen, and folded once for all attacks on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import Tensor, nn

from kdbench.evaluation.early_stopping import EarlyStopping, batch_size
from kdbench.training.bn_folding import folded


class EvaluatedNetwork:
    """A network (images -> logits) and its folded copy, made once, when the first attack needs it.

    Attacks work on the copy, which is faster and gives the same answers up to rounding. Whether an example is
    misclassified is decided by the network itself.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        """x: images (N,C,H,W) in [0,1] that it will be evaluated on; the folded copy is compared on some of them."""
        self.network, self._x = network, x

    @cached_property
    def folded(self) -> nn.Module:
        """The frozen copy in eval mode, images -> logits."""
        return folded(self.network, self._x)

    @cached_property
    def attacked(self) -> EarlyStopping:
        """The folded copy as attacks see it."""
        return EarlyStopping(self.folded, batch_size(self._x))


@contextmanager
def frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; afterwards every module and parameter as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
