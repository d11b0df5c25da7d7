"""Matrix products in block-wise fp8, as DeepSeek-V3 was trained (arXiv:2412.19437, section 3.3).

Both factors are e4m3 with fp32 scales, the sum is fp32, and the results have the inputs' dtype:

    y = x w^T     x in tiles of 1 x 128, w in blocks of 128 x 128 (those of precision/blockwise.py)
    dx = dy w     dy in tiles of 1 x 128, w in the same blocks
    dw = dy^T x   both in tiles of 128 rows x 1: the inner dim is that of the rows

Tiles at an edge are smaller, and each expert's rows begin with a tile of their own. All of it is
here in plain PyTorch: values are rounded to what fp8 holds, and multiplied in fp32.

Shape suffixes: R rows, sorted by expert, I inputs, O outputs, E experts held here, M rows
with zeros between them, so that each expert's begin with a tile.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.ops import gradients_asked_for
from torchsft.ops.grouped import Products
from torchsft.ops.permute import Order, rows_of, tokens_of
from torchsft.ops.tiles import SIZE, padding_of
from torchsft.precision.blockwise import BLOCK, encode, scale_of

INNER, ROWS = (1, SIZE), (SIZE, 1)  # tiles along the inner dim of y and dx, and of dw


def rounded(values: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> Tensor:
    """Round to what e4m3 holds with one scale for each tile.

    Args:
        values: [..., m, n], of any floating dtype.
        tile: rows and columns of a tile; those at the edges are smaller.
        power_of_two: round scales up to powers of two.

    Returns:
        The rounded values, fp32 [..., m, n].
    """
    rows, columns = values.shape[-2:]
    height, width = tile
    to_whole_tiles = (0, -columns % width, 0, -rows % height)
    padded = F.pad(values.float(), to_whole_tiles)
    # [..., tiles down, height, tiles across, width]
    tiles = padded.unflatten(-2, (-1, height)).unflatten(-1, (-1, width))
    largest = tiles.abs().amax((-3, -1), keepdim=True)
    scale = scale_of(largest, power_of_two)
    kept = encode(tiles, scale).float() * scale
    padded = kept.flatten(-4, -3).flatten(-2)
    return padded[..., :rows, :columns]


@dataclass(frozen=True)
class BlockwiseProducts(Products):
    """These products, in plain PyTorch; see `Products` for what they are given."""

    power_of_two: bool = False  # scales
    # matrices [O / parts, I], each with blocks of its own, that a weight of an expert consists of
    parts: int = 1
    input_order: Order | None = None
    output_order: Order | None = None
    sorts: ClassVar[bool] = True

    def forward(self, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return y_RO."""
        weight_EIO = self.held(weight_EOI).mT
        y_RO = self._by_rows(x_RI, self.input_order, weight_EIO, offs_E)
        return tokens_of(y_RO, self.output_order)

    def grad_rows(self, grad_RO: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of x_RI."""
        weight_EOI = self.held(weight_EOI)
        grad_x_RI = self._by_rows(grad_RO, self.output_order, weight_EOI, offs_E)
        return tokens_of(grad_x_RI, self.input_order)

    def _by_rows(self, rows: Tensor, order: Order | None, weight: Tensor, offs_E: Tensor) -> Tensor:
        held = rounded(rows_of(rows, order), INNER, self.power_of_two)
        return grouped(held, weight, offs_E).to(rows.dtype)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of weight_EOI: the inner dim is that of the rows, so that an expert's
        rows must fill whole tiles.
        """
        # where tokens are sorted here, they are no more than rows
        padding = padding_of(offs_E, max(len(grad_RO), len(x_RI)), SIZE)
        grad_MO = padding.pad(rows_of(grad_RO, self.output_order))
        grad_MO = rounded(grad_MO, ROWS, self.power_of_two)
        x_MI = padding.pad(rows_of(x_RI, self.input_order))
        x_MI = rounded(x_MI, ROWS, self.power_of_two)
        return grouped(grad_MO.mT, x_MI, padding.offs_E).to(x_RI.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of a linear map, differentiable.

        Args:
            x: [..., I].
            weight: [O, I].
            bias: [O]; None: there is none.
        """
        *leading, _ = x.shape
        y_RO = _Linear.apply(x.flatten(0, -2), weight, self)
        y = y_RO.unflatten(0, leading)
        return y if bias is None else y + bias

    def held(self, weight_EOI: Tensor) -> Tensor:
        """Return a weight as fp8 holds it.

        Args:
            weight_EOI: of any floating dtype.

        Returns:
            fp32 [E, O, I].
        """
        # blocks do not reach from one matrix into the next
        matrices = weight_EOI.unflatten(-2, (self.parts, -1))
        held = rounded(matrices, BLOCK, self.power_of_two)
        return held.flatten(-3, -2)


def grouped(a: Tensor, b: Tensor, offs_E: Tensor) -> Tensor:
    """Return `F.grouped_mm` of fp32; of one expert, which a linear map is, an ordinary product.

    Args:
        a: [R, I] or, for the gradient of a weight, [O, M].
        b: [E, I, O] or [M, I].
        offs_E: where each expert's rows end.
    """
    if len(offs_E) > 1:
        return F.grouped_mm(a, b, offs=offs_E)
    if b.ndim == 3:
        return a @ b.squeeze(0)
    return (a @ b).unsqueeze(0)


class _Linear(torch.autograd.Function):
    """A linear map as one expert that all rows are of; zero-bubble pipelines traverse it twice."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, products: BlockwiseProducts) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_RI if need_weight else None, weight if need_x else None)
        ctx.products = products
        return products.forward(x_RI, weight.unsqueeze(0), _one_group(x_RI))

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight = ctx.saved_tensors
        want_x, want_weight = gradients_asked_for(ctx)[:2]
        offs, products = _one_group(grad_RO), ctx.products
        grad_x_RI = grad_weight = None
        if want_x:
            grad_x_RI = products.grad_rows(grad_RO, weight.unsqueeze(0), offs)
        if want_weight:
            grad_weight = products.grad_weight(grad_RO, x_RI, offs).squeeze(0)
        return grad_x_RI, grad_weight, None


def _one_group(x_RI: Tensor) -> Tensor:
    """Return `offs_E` of one expert."""
    return torch.full((1,), len(x_RI), dtype=torch.int32, device=x_RI.device)
