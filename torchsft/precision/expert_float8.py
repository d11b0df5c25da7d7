"""Products of routed experts in fp8 with scales along the inner dim, as torchao trains them:

    float8    one scale for each row of a factor (torchao's fp8_rowwise)
    mxfp8     one for each 32 entries of a row (MXFP8 of the OCP, torchao's mxfp8_rceil)

In both, all factors of y, dx and dw are e4m3, and scales are powers of two, just large enough that
nothing overflows. The inner dim of dw is that of the rows: an expert's rows are a row of a factor,
and its blocks of 32 begin with them.

`emulated` is all of it in plain PyTorch: values are rounded to what fp8 holds, and multiplied in
fp32. The same by torchao's kernels is in precision/expert_float8_kernels.py.

Shape suffixes: R rows, sorted by expert, M rows with zeros behind those of each expert, I inputs,
O outputs, E experts held here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsft.ops.grouped import Products, zero_gradients_without_rows
from torchsft.ops.tiles import Padding, padding_of
from torchsft.precision.blockwise_compute import BlockwiseProducts, grouped, rounded

BLOCK = 32  # of MXFP8

# of padded rows, a weight or rows, and where each expert's padded rows end
Product = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertFloat8(Products):
    """The products of a number format; see `Products` for what they are given."""

    multiple: int  # that each expert's rows are padded to
    y: Product  # of x_MI and weight_EIO
    dx: Product  # of grad_MO and weight_EIO
    dw: Product  # [E, I, O], of grad_MO and x_MI
    # of rows, what y and dx are given as padded rows
    pad: Callable[[Padding, Tensor], Any] = Padding.pad

    linear = BlockwiseProducts.linear  # by the three products below

    def forward(self, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return y_RO."""
        return self._by_rows(self.y, x_RI, weight_EOI, offs_E)

    def grad_rows(self, grad_RO: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of x_RI."""
        return self._by_rows(self.dx, grad_RO, weight_EOI, offs_E)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of weight_EOI."""
        padding = padding_of(offs_E, len(x_RI), self.multiple)
        grad_EOI = self.dw(padding.pad(grad_RO), padding.pad(x_RI), padding.offs_E).mT
        zero_gradients_without_rows(offs_E, grad_EOI)
        return grad_EOI.to(x_RI.dtype)

    def _by_rows(
        self, product: Product, rows: Tensor, weight_EOI: Tensor, offs_E: Tensor
    ) -> Tensor:
        padding = padding_of(offs_E, len(rows), self.multiple)
        padded = product(self.pad(padding, rows), weight_EOI.mT, padding.offs_E)
        return padded[padding.place_R].to(rows.dtype)


def emulated(block: int | None) -> ExpertFloat8:
    """Return products in plain PyTorch (that of the weight's gradient reads offs_E on the host).

    Args:
        block: entries along the inner dim that share a scale; None: all of them.
    """

    def held(values: Tensor) -> Tensor:
        """Return what fp8 holds of a factor whose last dim is the inner one, fp32."""
        return rounded(values, (1, block or max(values.shape[-1], 1)), power_of_two=True)

    def dw(grad_MO: Tensor, x_MI: Tensor, offs_E: Tensor) -> Tensor:
        ends = offs_E.tolist()
        experts = list(zip(x_MI.tensor_split(ends), grad_MO.tensor_split(ends), strict=True))
        return torch.stack([held(x.mT) @ held(grad.mT).mT for x, grad in experts[: len(ends)]])

    return ExpertFloat8(
        block or 1,
        y=lambda x_MI, weight_EIO, offs_E: grouped(held(x_MI), held(weight_EIO.mT).mT, offs_E),
        dx=lambda grad_MO, weight_EIO, offs_E: grouped(held(grad_MO), held(weight_EIO).mT, offs_E),
        dw=dw,
    )
