"""Products of routed experts in fp8 with scales along the inner dim, as torchao trains them:

    float8    one scale for each row of a factor (torchao's fp8_rowwise)
    mxfp8     one for each 32 entries of a row (MXFP8 of the OCP, torchao's mxfp8_rceil)

In both, all factors of y, dx and dw are e4m3, and scales are powers of two, just large enough that
nothing overflows. The inner dim of dw is that of the rows: an expert's rows are a row of a factor,
and its blocks of 32 begin with them.

All of it is here in plain PyTorch: values are rounded to what fp8 holds, and multiplied in fp32.
The same by torchao's kernels is in precision/expert_float8_kernels.py.

Shape suffixes: R rows, sorted by expert, I inputs, O outputs, E experts held here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchsft.ops.grouped import Products
from torchsft.precision.blockwise_compute import BlockwiseProducts, grouped, rounded

BLOCK = 32  # of MXFP8


@dataclass(frozen=True)
class ExpertFloat8(Products):
    """These products; see `Products` for what they are given."""

    block: int | None  # entries along the inner dim that share a scale; None: all of them

    linear = BlockwiseProducts.linear  # by the three products below

    def forward(self, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return y_RO."""
        weight = self.held(weight_EOI)
        return grouped(self.held(x_RI), weight.mT, offs_E).to(x_RI.dtype)

    def grad_rows(self, grad_RO: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of x_RI."""
        weight = self.held(weight_EOI.mT).mT
        return grouped(self.held(grad_RO), weight, offs_E).to(grad_RO.dtype)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of weight_EOI (reads offs_E on the host)."""
        lengths = offs_E.diff(prepend=offs_E.new_zeros(1)).tolist()
        experts = zip(grad_RO.split(lengths), x_RI.split(lengths), strict=True)
        gradients = [self.held(grad.mT) @ self.held(x.mT).mT for grad, x in experts]
        return torch.stack(gradients).to(x_RI.dtype)

    def held(self, values: Tensor) -> Tensor:
        """Return what fp8 holds of a factor whose last dim is the inner one, fp32."""
        inner = values.shape[-1]
        return rounded(values, (1, self.block or max(inner, 1)), power_of_two=True)
