"""Moving tokens to their experts and back.

    permute    x_TD[order // K]: every token copied once per chosen expert, rows sorted by expert
    combine    sum over a token's K rows, back in token order
    copy_rows  permute, where tokens have different numbers of rows
    sum_rows   combine, likewise

All are bijections between (token, choice) and row, so the backward pass of each is a gather too:
deterministic, no scatter-add. Indices are kept as attributes, not as saved tensors, so that
activation checkpointing does not compute them again: nothing then needs what a repetition would
send back from the experts. Sums over K use `embedding_bag`, which never builds the [T, K, D]
intermediate (on CPU seven times faster than gather + sum, measured at T = 4096, K = 4, D = 512);
with K = 1, as ranks reorder rows that they receive, there is nothing to sum.

Shape suffixes: T tokens, D width, K choices per token, R = T * K routed rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.ops import plain


def permute(x_TD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
    """Copy every token once per chosen expert, in the order of the rows.

    Args:
        x_TD: tokens, of any floating dtype, which the result has too.
        order_R: int64, a permutation of 0..R-1; order_R[r] = t * K + k is the (token, choice) that
            row r holds.
        row_TK: int64, its inverse; row_TK[t, k] is the row of choice k of token t.

    Returns:
        The rows, [R, D].
    """
    if plain():
        return permute_reference(x_TD, order_R, row_TK)
    return _Permute.apply(x_TD, order_R, row_TK)


def permute_reference(x_TD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
    """`permute` in plain PyTorch."""
    return x_TD[order_R // row_TK.shape[1]]


def combine(y_RD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
    """Add up the rows of every token: y_TD[t] = sum_k y_RD[row_TK[t, k]].

    Args:
        y_RD: rows, of any floating dtype, which the sums have too; they are accumulated in fp32.
        order_R: as for `permute`.
        row_TK: as for `permute`.
    """
    if plain():
        return combine_reference(y_RD, order_R, row_TK)
    return _Combine.apply(y_RD, order_R, row_TK)


def combine_reference(y_RD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
    """`combine` in plain PyTorch."""
    return y_RD[row_TK].sum(1)


def _sums(y_RD: Tensor, row_TK: Tensor) -> Tensor:
    """Return the sum of every token's rows."""
    if row_TK.shape[1] == 1:
        return y_RD.index_select(0, row_TK.flatten())
    return F.embedding_bag(row_TK, y_RD, mode="sum")


def inverse(order_R: Tensor) -> Tensor:
    """Return the inverse of a permutation, int64."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return inverse_R


class Order(NamedTuple):
    """How tokens are sorted into rows, K of each: arguments of `permute` and `combine`."""

    order_R: Tensor
    row_TK: Tensor

    def is_one_to_one(self) -> bool:
        """Whether each token has one row."""
        return self.row_TK.shape[1] == 1

    def token_R(self) -> Tensor:
        """Return the token of each row, int64."""
        order_R, row_TK = self
        return order_R if self.is_one_to_one() else order_R // row_TK.shape[1]


def rows_of(x_TD: Tensor, order: Order | None) -> Tensor:
    """`permute` without a gradient; None: what is given is sorted."""
    return x_TD if order is None else x_TD.index_select(0, order.token_R())


def tokens_of(y_RD: Tensor, order: Order | None) -> Tensor:
    """`combine` without a gradient; None: what is given stays sorted."""
    return y_RD if order is None else _sums(y_RD, order.row_TK)


class Rows(NamedTuple):
    """Rows that are copies of tokens, any number of each token; int64."""

    token_R: Tensor  # the token of each row
    row_R: Tensor  # the rows in the order of their tokens
    first_T: Tensor  # where the rows of each token begin in `row_R`


def copy_rows(x_TD: Tensor, rows: Rows) -> Tensor:
    """Copy every token once per row: x_TD[token_R]."""
    return x_TD[rows.token_R] if plain() else _CopyRows.apply(x_TD, rows)


def sum_rows(y_RD: Tensor, rows: Rows) -> Tensor:
    """Add up the rows of every token; accumulated in fp32 as in `combine`."""
    if plain():
        y_TD = y_RD.new_zeros(len(rows.first_T), *y_RD.shape[1:])
        return y_TD.index_add(0, rows.token_R, y_RD)
    return _SumRows.apply(y_RD, rows)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x_TD.index_select(0, rows.token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        _, row_R, first_T = ctx.rows
        return F.embedding_bag(row_R, grad_RD.contiguous(), first_T, mode="sum"), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, rows: Rows) -> Tensor:
        ctx.token_R = rows.token_R
        return F.embedding_bag(rows.row_R, y_RD, rows.first_T, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.token_R), None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.row_TK = row_TK
        token_R = order_R // row_TK.shape[1]
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return _sums(grad_RD.contiguous(), ctx.row_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.token_R = order_R // row_TK.shape[1]
        return _sums(y_RD, row_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return grad_TD.index_select(0, ctx.token_R), None, None
