"""Triton kernels of experts' SwiGLU. Their plain twins are in ops/swiglu.py:

    weighted_swiglu             silu(gate) * up * weight
    weighted_swiglu_backward    its gradients, and once more itself, in place

All of a row is computed in fp32 and rounded once.

Shape suffixes: R rows, F expert width, G = 2F gate|up.
"""

# ruff: noqa: ANN001 (Triton's arguments have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024  # columns at a time: 16 bytes of bf16 for each of 128 threads


@triton.jit
def _load(place, inside):
    """Return what lies at these places, fp32, and zeros where they are not inside."""
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(place, values, inside):
    """Put values, rounded to the dtype that lies there, where places are inside."""
    rounded = values.to(place.dtype.element_ty)
    tl.store(place, rounded, mask=inside)


@triton.jit
def _forward_kernel(both, weights, hidden, F, width: tl.constexpr):
    """Compute `width` columns of a row; see `weighted_swiglu`.

    both is [R, 2F], weights fp32 [R], hidden [R, F]. Program (r, n) has the n-th columns of row r.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * width
    column = first + tl.arange(0, width)
    inside = column < F
    place = both + row * 2 * F + column
    gate = _load(place, inside)
    up = _load(place + F, inside)
    weight = tl.load(weights + row)
    activated = gate * tl.sigmoid(gate)
    value = activated * up * weight
    _store(hidden + row * F + column, value, inside)


@triton.jit
def _backward_kernel(
    both, weights, grad, grad_weights, F, keep_hidden: tl.constexpr, width: tl.constexpr
):
    """Go back through a row; see `weighted_swiglu_backward`.

    both is [R, 2F], weights fp32 [R], grad [R, F], grad_weights fp32 [R]. Program r has row r.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    total = tl.zeros((width,), tl.float32)
    for begin in range(0, F, width):
        column = begin + tl.arange(0, width)
        inside = column < F
        place = both + row * 2 * F + column
        grad_place = grad + row * F + column
        gate = _load(place, inside)
        up = _load(place + F, inside)
        upstream = _load(grad_place, inside)
        share = tl.sigmoid(gate)
        activated = gate * share
        slope = share * (1 + gate * (1 - share))  # of silu
        total += upstream * activated * up
        upstream *= weight
        grad_activated = upstream * up
        _store(place, grad_activated * slope, inside)
        _store(place + F, upstream * activated, inside)
        if keep_hidden:
            hidden = activated * up * weight
            _store(grad_place, hidden, inside)
    dot = tl.sum(total, 0)
    tl.store(grad_weights + row, dot)


def weighted_swiglu(both_RG: Tensor, weights_R1: Tensor) -> Tensor:
    """Return hidden_RF of contiguous gate|up and fp32 weights."""
    rows, columns = both_RG.shape
    width = columns // 2
    hidden_RF = both_RG.new_empty(rows, width)
    grid = rows, triton.cdiv(width, WIDTH)
    _forward_kernel[grid](both_RG, weights_R1, hidden_RF, width, WIDTH)
    return hidden_RF


def weighted_swiglu_backward(
    both_RG: Tensor, weights_R1: Tensor, grad_RF: Tensor, keep_hidden: bool
) -> Tensor:
    """Go back from contiguous tensors; see `ops.swiglu.weighted_swiglu_backward`."""
    rows, width = grad_RF.shape
    grad_weights_R1 = torch.empty_like(weights_R1)
    arguments = both_RG, weights_R1, grad_RF, grad_weights_R1, width
    _backward_kernel[(rows,)](*arguments, keep_hidden, WIDTH)
    torch.autograd.graph.increment_version((both_RG, grad_RF))
    return grad_weights_R1
