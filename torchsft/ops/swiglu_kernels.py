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
def _forward_kernel(both, weights, hidden, F, width: tl.constexpr):
    """Compute `width` columns of a row; see `weighted_swiglu`.

    both is [R, 2F], weights [R], hidden [R, F]. Program (r, n) has the n-th columns of row r.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = column < F
    place = both + row * 2 * F + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + F, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight
    tl.store(hidden + row * F + column, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    both, weights, grad, grad_weights, F, keep_hidden: tl.constexpr, width: tl.constexpr
):
    """Go back through a row; see `weighted_swiglu_backward`.

    both is [R, 2F], weights [R], grad [R, F], grad_weights [R]. Program r has row r.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((width,), tl.float32)
    for begin in range(0, F, width):
        column = begin + tl.arange(0, width)
        inside = column < F
        place = both + row * 2 * F + column
        grad_place = grad + row * F + column
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(place + F, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad_place, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        activated = gate * share
        slope = share * (1 + gate * (1 - share))  # of silu
        total += upstream * activated * up
        upstream *= weight
        grad_gate = upstream * up * slope
        grad_up = upstream * activated
        tl.store(place, grad_gate.to(both.dtype.element_ty), mask=inside)
        tl.store(place + F, grad_up.to(both.dtype.element_ty), mask=inside)
        if keep_hidden:
            hidden = activated * up * weight
            tl.store(grad_place, hidden.to(grad.dtype.element_ty), mask=inside)
    dot = tl.sum(total, 0)
    tl.store(grad_weights + row, dot.to(grad_weights.dtype.element_ty))


def weighted_swiglu(both_RG: Tensor, weights_R1: Tensor) -> Tensor:
    """Return hidden_RF of contiguous gate|up and weights."""
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
