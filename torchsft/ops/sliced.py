"""Networks of many experts for a rank that receives far more rows than others, a slice of rows at a
time.

`sliced` computes what a network of experts does, such as `grouped_swiglu` (ops/swiglu.py), but its
temporaries are those of a slice. Of all rows there are inputs and outputs, [R, D] each, in the
order in which they came: a slice's rows are sorted by expert when it is computed. In the backward
pass there are inputs and one gradient: that of inputs takes the place of that of outputs, which
nobody else may read (it has come from other ranks, or is new behind a gather of rows). Slices are
as many rows as came under an even load, or an eighth of all where that is more, wherever experts
begin; where they end within a slice is found on the device. Nothing but inputs is kept: a slice is
computed again in the backward pass; the repetition of a layer (activation checkpointing), which
only that pass needs, computes nothing.

Outputs and gradients of rows are those of the network (bit by bit, where a row's product does not
depend on how many rows there are: on a CPU it does); gradients of parameters are the slices'
gradients, each as the network rounds it, added up in fp32 and rounded once. (Tiles of fp8 that run
along rows begin with each slice, so that those gradients round otherwise.)

Shape suffixes: R rows, D width, E experts held here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchsft.ops import gradients_asked_for
from torchsft.ops.out_of_memory import current_note, explained
from torchsft.ops.repetition import Pass, repeating

# of rows sorted by expert, their weights [R, 1], where each expert's end (int32), and parameters
Network = Callable[..., Tensor]
# of sorted rows: which they are, where they lie, and where each expert's end among them
Slice = tuple[slice, slice | Tensor, Tensor]


def sliced(
    network: Network,
    size: int,
    order_R: Tensor | None,
    x_RD: Tensor,
    weights_R1: Tensor,
    offs_E: Tensor,
    *parameters: Tensor,
) -> Tensor:
    """Compute at most `size` of at least one row at a time.

    Args:
        network: what is computed.
        size: rows of a slice.
        order_R: int64, where each row, sorted by expert, lies in x_RD; None: there.
        x_RD: rows; the result has their order.
        weights_R1: of sorted rows.
        offs_E: int32, where each expert's sorted rows end.
        parameters: of the experts.
    """
    rows = len(x_RD)
    slices: list[Slice] = []
    for begin in range(0, rows, size):
        some = slice(begin, min(begin + size, rows))
        where = some if order_R is None else order_R[some]
        slices.append((some, where, (offs_E - begin).clamp(0, some.stop - begin)))
    return _Sliced.apply(network, slices, x_RD, weights_R1, *parameters)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        network: Network,
        slices: list[Slice],
        x_RD: Tensor,
        weights_R1: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_RD, weights_R1, *parameters)
        ctx.network, ctx.slices, ctx.note = network, slices, current_note()
        y_RD = torch.empty_like(x_RD)
        if repeating():  # whose backward pass reads no output
            return y_RD
        for some, where, offs in slices:
            y_RD[where] = network(x_RD[where], weights_R1[some], offs, *parameters)
        return y_RD

    @staticmethod
    @explained
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weights_R1, *parameters = ctx.saved_tensors
        asked = gradients_asked_for(ctx)
        want_x, want_weights, *_ = asked
        # The weight pass of a zero-bubble schedule, which comes later, reads it again.
        is_last_reader = asked == list(ctx.needs_input_grad[2:])
        grad_RD = grad_RD.contiguous()
        grad_x_RD = grad_RD if is_last_reader else torch.empty_like(grad_RD)
        grad_weights_R1 = torch.empty_like(weights_R1)
        sums: list[Tensor | None] = [None] * len(parameters)
        for some, where, offs in ctx.slices:
            given = x_RD[where], weights_R1[some], *parameters
            gradients = _gradients(ctx.network, given, offs, asked, grad_RD[where])
            del given
            if want_x:
                grad_x_RD[where] = gradients.pop(0)
            if want_weights:
                grad_weights_R1[some] = gradients.pop(0)
            sums = [_add(total, gradients.pop(0)) for total in sums]
        return (
            None,
            None,
            grad_x_RD if want_x else None,
            grad_weights_R1 if want_weights else None,
            *(_round(*pair) for pair in zip(sums, parameters, strict=True)),
        )


def _gradients(
    network: Network, given: Sequence[Tensor], offs_E: Tensor, asked: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Compute a slice again, and go back through it.

    Args:
        network: what is computed.
        given: rows, weights and parameters.
        offs_E: where each expert's rows end.
        asked: whether the gradient of each of `given` is.
        grad: of the output.

    Returns:
        What is asked for; None elsewhere, but no place for rows and weights.
    """
    pairs = zip(given, asked, strict=True)
    leaves = [tensor.detach().requires_grad_(is_asked) for tensor, is_asked in pairs]
    # as a repetition: nothing reads the output
    with torch.enable_grad(), Pass((), {}, True):
        y_RD = network(*leaves[:2], offs_E, *leaves[2:])
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(y_RD, wanted, grad))
    return [next(found) if is_asked else None for is_asked in asked]


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Add a slice's gradient of a parameter, if there is one, to a sum in at least fp32."""
    if gradient is None:
        return None
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total.add_(gradient)


def _round(total: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a sum of gradients, if there is one, in the parameter's dtype."""
    return None if total is None else total.to(parameter.dtype)
