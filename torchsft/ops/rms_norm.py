"""RMSNorm that saves its input and one number per row.

On CUDA `F.rms_norm` is one fused kernel each way; on CPU torch composes it from element-wise
operations whose backward pass takes 40 ms where this one takes 5 ms (T = 4096, D = 512, 2 cores),
so the CPU has its own two formulas here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.ops import gradients_asked_for, plain


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide x by its root mean square over the last dim and multiply with the weight: x /
    sqrt(mean(x^2) + eps) * weight, computed in fp32 (float64 stays float64).

    Args:
        x: [..., D] of any floating dtype, which the result has too.
        weight: [D].
        eps: added to the mean square.
    """
    if x.device.type != "cpu" or plain():
        return rms_norm_reference(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_of_parts(
    x: Tensor, weight: Tensor, eps: float, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """`rms_norm` of rows of which this process has a part.

    Args:
        x: [..., d], the part.
        weight: [d], its part of the weight.
        eps: added to the mean square.
        mean: averages the mean squares [..., 1] of each part over all parts, which have one size.
    """
    wide = _wide(x)
    mean_square = mean(wide.square().mean(-1, keepdim=True))
    scale = (mean_square + eps).rsqrt()
    return (wide * scale * weight).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or in float64 if it is that."""
    return x.float() if x.dtype.itemsize < 4 else x


class _RmsNorm(torch.autograd.Function):
    """Keeps x and, of each row, one over its root mean square: y = x * scale * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        mean_square = norm.square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()  # of each row: one over its root mean square
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        want_x, want_weight = gradients_asked_for(ctx)
        grad = _wide(grad)
        normed = _wide(x) * scale
        grad_x = grad_weight = None
        if want_weight:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if want_x:
            grad_normed = grad * weight
            # What changes the row's norm alone has no effect: without it, scale * (grad_normed -
            # normed * mean(grad_normed * normed)).
            along = torch.linalg.vecdot(grad_normed, normed)
            along = along.div_(x.shape[-1]).unsqueeze(-1)
            across = grad_normed.addcmul_(normed, along, value=-1)
            grad_x = across.mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None
