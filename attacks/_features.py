"""The distance of what enters a network's batch norms from their running statistics."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d)  # exactly these: a subclass may compute anything


class Features:
    """A frozen `model` in eval mode; while it is open, the distance of the batch norms' inputs from their statistics.

    While it is open, the model's plain batch norms compute their output and the moments of their input together.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.layers = [norm for norm in norms if norm.running_mean is not None]

    def __enter__(self) -> "Features":
        self._plain = [layer for layer in self.layers if type(layer) in PLAIN]
        for layer in self._plain:
            layer.forward = partial(self._norm, layer, *_affine(layer))  # type: ignore[method-assign]
        others = [layer for layer in self.layers if type(layer) not in PLAIN]
        self._hooks = [layer.register_forward_pre_hook(self._look) for layer in others]
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._plain:
            del layer.forward
        for hook in self._hooks:
            hook.remove()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N,K) for images `x`."""
        self._gaps = [x.new_zeros(())]
        z: Tensor = self.model(x)
        return z

    def distance(self) -> Tensor:
        """R_feat of the last images: sum over layers of ||var - running var|| + ||mean - running mean||."""
        return torch.stack(self._gaps).sum()

    def _norm(self, layer: nn.Module, scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
        y, mean, var = Normed.apply(x, scale, shift)
        self._compare(layer, mean, var)
        normed: Tensor = y
        return normed

    def _look(self, layer: Any, inputs: tuple[Tensor]) -> None:
        _, mean, var = Normed.apply(
            inputs[0], torch.ones_like(layer.running_mean), torch.zeros_like(layer.running_mean)
        )
        self._compare(layer, mean, var)

    def _compare(self, layer: Any, mean: Tensor, var: Tensor) -> None:
        self._gaps.append((var - layer.running_var).norm() + (mean - layer.running_mean).norm())


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm in eval mode."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


class Normed(torch.autograd.Function):
    """x scale + shift, and the mean and the biased variance (C,) of `x` (N,C,...); scale, shift (C,).

    x may be bf16; what is (C,) is fp32 then.

    Written by hand, because this is what an inversion costs beyond a forward and a backward pass. All gradients are one
    pass over memory, where autograd takes several, and torch.var_mean is slow on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        # In bf16 squares are rounded but their sum is not: over so many values the errors cancel.
        mean = x.mean(dims, dtype=scale.dtype)
        var = x.square().mean(dims, dtype=scale.dtype) - mean.square()
        ctx.save_for_backward(x, mean, scale)
        y = F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor, to_mean: Tensor, to_var: Tensor) -> tuple[Tensor, None, None]:
        x: Tensor
        x, mean, scale = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = 2 * to_var / count
        offset = to_mean / count - slope * mean
        wide = (1, -1, *[1] * (x.ndim - 2))
        slope, offset, scale = (value.to(x.dtype).view(wide) for value in (slope, offset, scale))
        return torch.addcmul(offset, x, slope).addcmul_(to_y, scale), None, None
