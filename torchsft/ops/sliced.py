"""SwiGLU of many experts for a rank that receives far more rows than others, a slice of rows at a
time.

`sliced_swiglu` is `grouped_swiglu` (ops/swiglu.py) whose temporaries are those of a slice: of all
rows there are inputs and outputs, [R, D] each, but nothing that is F wide, and in the backward pass
inputs and one gradient: that of inputs takes the place of that of outputs, which nobody else may
read (behind a gather of rows it is new, as in every exchange). Slices are as many rows as
came under an even load, or an eighth of all where that is more, wherever experts begin; where they
end within a slice is found on the device. Nothing of gate|up is kept, but computed again in the
backward pass; the repetition of a layer (activation checkpointing), which only that pass needs,
computes nothing.

Outputs and gradients of rows are those of `grouped_swiglu` (bit by bit, where a row's product does
not depend on how many rows there are: on a CPU it does); gradients of weights are the slices'
gradients, each as `Products` rounds it, added up in fp32 and rounded once. (Tiles of fp8 that run
along rows begin with each slice, so that those gradients round otherwise.)

Shape suffixes: R rows, D width, F expert width, E experts held here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchsft.ops import gradients_asked_for
from torchsft.ops.out_of_memory import current_note, explained
from torchsft.ops.repetition import repeating
from torchsft.ops.swiglu import ExpertProducts, _first_traversal, weighted_swiglu


def sliced_swiglu(
    x_RD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights_R1: Tensor,
    offs_E: Tensor,
    products: ExpertProducts,
    size: int,
) -> Tensor:
    """Return what `grouped_swiglu` returns, by at most `size` of at least one row at a time."""
    return _Sliced.apply(x_RD, gate_up, down, weights_R1, offs_E, products, size)


def _slices(offs_E: Tensor, rows: int, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows, and where each expert's rows end in them."""
    for begin in range(0, rows, size):
        some = slice(begin, min(begin + size, rows))
        yield some, (offs_E - begin).clamp(0, some.stop - begin)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights_R1: Tensor,
        offs_E: Tensor,
        products: ExpertProducts,
        size: int,
    ) -> Tensor:
        ctx.save_for_backward(x_RD, gate_up, down, weights_R1, offs_E)
        ctx.products, ctx.size, ctx.note = products, size, current_note()
        of_both, of_down = products
        y_RD = torch.empty_like(x_RD)
        if repeating():  # whose backward pass reads no output
            return y_RD
        for some, offs in _slices(offs_E, len(x_RD), size):
            both = of_both.forward(x_RD[some], gate_up, offs)
            hidden = weighted_swiglu(both, weights_R1[some])
            del both
            y_RD[some] = of_down.forward(hidden, down, offs)
        return y_RD

    @staticmethod
    @explained
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_up, down, weights_R1, offs_E = ctx.saved_tensors
        of_both, of_down = ctx.products
        asked = gradients_asked_for(ctx)
        want_x, want_gate_up, want_down, want_weights, _ = asked
        # The weight pass of a zero-bubble schedule, which comes later, reads it again.
        is_last_reader = asked == list(ctx.needs_input_grad[:5])
        grad_RD = grad_RD.contiguous()
        grad_x_RD = grad_RD if is_last_reader else torch.empty_like(grad_RD)
        grad_weights_R1 = torch.empty_like(weights_R1) if want_weights else None
        sum_gate_up = sum_down = None
        for some, offs in _slices(offs_E, len(x_RD), ctx.size):
            both = of_both.forward(x_RD[some], gate_up, offs)
            saved = x_RD[some], gate_up, down, weights_R1[some], offs, both
            kept, grad_down = _first_traversal(*saved, grad_RD[some], of_down, want_down, False)
            sum_down = _add(sum_down, grad_down)
            if want_x:
                grad_x_RD[some] = of_both.grad_rows(kept.grad_both_RG, gate_up, offs)
            if want_weights:
                grad_weights_R1[some] = kept.grad_weights_R1
            if want_gate_up:
                grad_gate_up = of_both.grad_weight(kept.grad_both_RG, x_RD[some], offs)
                sum_gate_up = _add(sum_gate_up, grad_gate_up)
        sum_gate_up = _round(sum_gate_up, gate_up)
        sum_down = _round(sum_down, down)
        return (
            grad_x_RD if want_x else None,
            sum_gate_up,
            sum_down,
            grad_weights_R1,
            None,
            None,
            None,
        )


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Add a slice's gradient of a weight, if there is one, to a sum in at least fp32."""
    if gradient is None:
        return None
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total.add_(gradient)


def _round(total: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return a sum of gradients of a weight, if there is one, in the weight's dtype."""
    return None if total is None else total.to(weight.dtype)
