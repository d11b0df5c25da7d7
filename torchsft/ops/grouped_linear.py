"""Linear maps with biases, of many experts at once.

    grouped_linear    x @ weight[e] + bias[e] for rows sorted by expert, with `F.grouped_mm`; the
                      bias may have a factor in each row. Its plain twin is
                      `grouped_linear_reference`, one matrix product per expert.

Shape suffixes: R rows, I inputs, O outputs, E experts held here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.ops import gradients_asked_for
from torchsft.ops.grouped import leaves_gradients_without_rows, zero_gradients_without_rows
from torchsft.ops.repetition import once


def grouped_linear(
    x_RI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor,
    offs_E: Tensor,
    factor_R1: Tensor | None = None,
    name: str = "",
) -> Tensor:
    """Apply each expert's linear map to its rows.

    Args:
        x_RI: rows sorted by expert, at least one.
        weight_EIO: in the dtype of x_RI. I and O must be multiples of 16 bytes.
        bias_EO: in the same dtype.
        offs_E: int32; expert e owns the rows offs_E[e - 1] to offs_E[e]. offs_E[-1] must be R.
        factor_R1: of the bias in each row; None: 1.
        name: of the product, where a layer that is computed again may keep it (`ops.repetition`).
    """
    y_RO = _GroupedLinear.apply(x_RI, weight_EIO, offs_E, name)
    # Biases are added by a product with one factor in each row: so their gradients are products
    # too, summed in fp32 whatever the dtype, and always in the same order.
    row_R = torch.arange(len(x_RI), device=x_RI.device, dtype=torch.int32)
    expert_R1 = torch.searchsorted(offs_E, row_R, right=True).unsqueeze(1)
    owner_RE = expert_R1 == torch.arange(len(offs_E), device=x_RI.device)
    factors_RE = owner_RE if factor_R1 is None else torch.where(owner_RE, factor_R1, 0)
    return torch.addmm(y_RO, factors_RE.to(y_RO.dtype), bias_EO)


def grouped_linear_reference(
    x_RI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor,
    offs_E: Tensor,
    factor_R1: Tensor | None = None,
    name: str = "",
) -> Tensor:
    """`grouped_linear` in plain PyTorch, one expert after the other (reads offs_E on the host)."""
    lengths = offs_E.diff(prepend=offs_E.new_zeros(1)).tolist()
    if factor_R1 is None:
        factor_R1 = torch.ones_like(x_RI[:, :1])
    factors = factor_R1.to(x_RI.dtype).split(lengths)
    experts = zip(x_RI.split(lengths), weight_EIO, factors, bias_EO, strict=True)
    return torch.cat([rows @ weight + factor * bias for rows, weight, factor, bias in experts])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EIO: Tensor, offs_E: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EIO, offs_E)
        return once(name, lambda: F.grouped_mm(x_RI, weight_EIO, offs=offs_E))

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RI, weight_EIO, offs_E = ctx.saved_tensors
        want_x, want_weight, *_ = gradients_asked_for(ctx)
        grad_RO = grad_RO.contiguous()  # grouped_mm refuses expanded (stride 0) gradients
        grad_x_RI = grad_weight = None
        if want_x:
            grad_x_RI = F.grouped_mm(grad_RO, weight_EIO.mT, offs=offs_E)
        if want_weight:
            grad_weight = F.grouped_mm(x_RI.mT, grad_RO, offs=offs_E)
            if leaves_gradients_without_rows(grad_weight.device):
                zero_gradients_without_rows(offs_E, grad_weight)
        return grad_x_RI, grad_weight, None, None
