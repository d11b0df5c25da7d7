"""SwiGLU feed-forward networks that save little for the backward pass.

    swiglu            silu(gate) * up; replaces F.silu(gate) * up, which also saves silu(gate)
    grouped_swiglu    down(silu(gate(x)) * up(x) * weight) for rows sorted by expert, with
                      `F.grouped_mm`; saves x, gate|up and weights, recomputes the rest. Its plain
                      twin is `grouped_swiglu_reference`, one matrix product per expert.
    weighted_swiglu   what is between its products; the kernels are in ops/swiglu_kernels.py

The routing weight of a row stands before the down projection, which is linear: so its gradient
needs no output of the experts, which then need not be kept, nor computed again and sent back.

Shape suffixes: R rows (of those that were received), D width, F expert width, E experts held
here (`e` elsewhere).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.ops import gradients_asked_for, kernels, plain
from torchsft.ops.grouped import Products
from torchsft.ops.out_of_memory import current_note, explained
from torchsft.ops.repetition import PRODUCTS, once, repeating

# the products of gate|up and of down
ExpertProducts = tuple[Products, Products]
GROUPED_MM = (Products(), Products())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element-wise; both of one shape and floating dtype, which the result has
    too.
    """
    return swiglu_reference(gate, up) if plain() else _Swiglu.apply(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch."""
    return F.silu(gate) * up


def grouped_swiglu(
    x_RD: Tensor,  # rows sorted by expert
    # [E, 2F, D], gate rows first, then up; dtype of x_RD. D and F must be multiples of 16 bytes
    gate_up: Tensor,
    down: Tensor,  # [E, D, F]
    weights_R1: Tensor,  # factor of each row's output; fp32 in a model
    # int32; expert e owns the rows offs_E[e - 1] to offs_E[e]. offs_E[-1] must be R
    offs_E: Tensor,
    products: ExpertProducts = GROUPED_MM,
) -> Tensor:
    """Apply each expert's SwiGLU network to its rows: y_RD, weighted, in the dtype of x_RD."""
    if x_RD.shape[0] == 0:  # a rank that receives no rows: kernels need not support that
        return x_RD * weights_R1.to(x_RD.dtype) + 0 * (gate_up.sum() + down.sum())
    both_RG = _GroupedSwiglu.apply(x_RD, gate_up, down, weights_R1, offs_E, products)
    return _Down.apply(both_RG, down.detach(), weights_R1.detach(), offs_E, products[1])


def grouped_swiglu_reference(
    x_RD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights_R1: Tensor,
    offs_E: Tensor,
    products: ExpertProducts = GROUPED_MM,
) -> Tensor:
    """`grouped_swiglu` in plain PyTorch, one expert after the other (reads offs_E on the host)."""
    lengths = offs_E.diff(prepend=offs_E.new_zeros(1)).tolist()
    rows = zip(x_RD.split(lengths), weights_R1.split(lengths), gate_up, down, strict=True)
    outputs = []
    for x, weights, expert_gate_up, expert_down in rows:
        both = products[0].linear(x, expert_gate_up, None)
        hidden = weighted_swiglu_reference(both, weights)
        outputs.append(products[1].linear(hidden, expert_down, None))
    return torch.cat(outputs)


def weighted_swiglu(both_RG: Tensor, weights_R1: Tensor) -> Tensor:
    """silu(gate) * up * weight of gate|up, [R, F], computed in fp32 (float64 stays float64) and
    rounded once.
    """
    if kernels(both_RG):
        from torchsft.ops import swiglu_kernels

        return swiglu_kernels.weighted_swiglu(both_RG.contiguous(), weights_R1.contiguous())
    return weighted_swiglu_reference(both_RG, weights_R1)


def weighted_swiglu_reference(both_RG: Tensor, weights_R1: Tensor) -> Tensor:
    """`weighted_swiglu` in plain PyTorch."""
    if both_RG.dtype.itemsize >= 4:
        return _weighted_swiglu_at_once(both_RG, weights_R1)
    # in pieces: the whole of it in fp32 would need twice its memory
    pieces = zip(both_RG.chunk(16), weights_R1.chunk(16), strict=True)
    return torch.cat([_weighted_swiglu_at_once(*piece) for piece in pieces])


def _weighted_swiglu_at_once(both_RG: Tensor, weights_R1: Tensor) -> Tensor:
    """Compute a piece, or all of it."""
    gate_RF, up_RF = both_RG.chunk(2, dim=-1)
    if both_RG.dtype.itemsize < 4:
        gate_RF = gate_RF.float()
    return (swiglu_reference(gate_RF, up_RF) * weights_R1).to(both_RG.dtype)


def weighted_swiglu_backward(
    both_RG: Tensor, weights_R1: Tensor, grad_RF: Tensor, keep_hidden: bool
) -> Tensor:
    """Go back through `weighted_swiglu`.

    Args:
        both_RG: gate|up, contiguous; replaced by its gradient.
        weights_R1: as they were.
        grad_RF: gradient of the result, contiguous; replaced by that result if `keep_hidden`, else
            undefined afterwards.
        keep_hidden: whether the result is wanted again.

    Returns:
        The gradient of the weights.
    """
    arguments = both_RG, weights_R1.contiguous(), grad_RF, keep_hidden
    if kernels(both_RG):
        from torchsft.ops import swiglu_kernels

        return swiglu_kernels.weighted_swiglu_backward(*arguments)
    return weighted_swiglu_backward_reference(*arguments)


def weighted_swiglu_backward_reference(
    both_RG: Tensor, weights_R1: Tensor, grad_RF: Tensor, keep_hidden: bool
) -> Tensor:
    """`weighted_swiglu_backward` in plain PyTorch."""
    dots = []
    # In pieces that stay in the cache.
    pieces = (x.chunk(16) for x in (both_RG, weights_R1, grad_RF))
    for both, weights, grad in zip(*pieces, strict=True):
        hidden = _weighted_swiglu_at_once(both, weights) if keep_hidden else None
        gate, up = both.chunk(2, dim=-1)
        activated = F.silu(gate)
        dots.append((grad.to(weights.dtype) * activated * up).sum(-1, keepdim=True))
        grad.mul_(weights)
        grad_activated = grad * up
        torch.mul(grad, activated, out=up)
        # The gradient of gate|up takes the place of gate|up, which nothing reads after this (a
        # second backward through the same graph is refused by autograd's version check).
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=gate)
        if hidden is not None:
            grad.copy_(hidden)
    return torch.cat(dots)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


@dataclass
class _Kept:
    """What the first traversal of a backward pass leaves for the gradients of the later one."""

    x_RD: Tensor | None
    gate_up: Tensor
    offs_E: Tensor
    # input of the down projection; None: nothing will ask for it
    hidden_RF: Tensor | None
    grad_both_RG: Tensor  # gradient of gate|up, G = 2F
    grad_weights_R1: Tensor


class _GroupedSwiglu(torch.autograd.Function):
    """Gives gate|up, and has the backward pass of all: `_Down`, which gives the rest, keeps
    nothing. So activation checkpointing, which computes again up to what is kept last, leaves that
    rest out.

    Zero-bubble pipeline schedules traverse it twice, for rows and later for weights
    (`ops.gradients_asked_for`); others once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights_R1: Tensor,
        offs_E: Tensor,
        products: ExpertProducts,
    ) -> Tensor:
        ctx.products, ctx.note = products, current_note()
        both_RG = once(PRODUCTS, lambda: products[0].forward(x_RD, gate_up, offs_E))
        # Only the gradient of gate_up reads x: frozen experts do not keep it.
        x_to_keep = x_RD if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x_to_keep, gate_up, down, weights_R1, offs_E, both_RG)
        ctx.pending = list(ctx.needs_input_grad[:5])  # gradients that no traversal has computed yet
        ctx.kept = None
        return both_RG

    @staticmethod
    @explained
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        of_both, of_down = ctx.products
        asked = gradients_asked_for(ctx)
        want_x, want_gate_up, want_down, want_weights, _ = asked
        ctx.pending = [pending and not now for pending, now in zip(ctx.pending, asked, strict=True)]
        later = any(ctx.pending)
        grad_x_RD = grad_gate_up = grad_down = None
        kept = ctx.kept
        if kept is None:
            kept, grad_down = _first_traversal(
                *ctx.saved_tensors, ctx.grad_RD, of_down, want_down, later
            )
        elif want_down:
            grad_down = of_down.grad_weight(ctx.grad_RD, kept.hidden_RF, kept.offs_E)
        ctx.kept = kept if later else None
        if not later:
            ctx.grad_RD = None
        if want_x:
            grad_x_RD = of_both.grad_rows(kept.grad_both_RG, kept.gate_up, kept.offs_E)
        if want_gate_up:
            grad_gate_up = of_both.grad_weight(kept.grad_both_RG, kept.x_RD, kept.offs_E)
        grad_weights_R1 = kept.grad_weights_R1 if want_weights else None
        return grad_x_RD, grad_gate_up, grad_down, grad_weights_R1, None, None


class _Down(torch.autograd.Function):
    """The rest of `_GroupedSwiglu`, which gets its gradient [R, D] by the side."""

    @staticmethod
    def forward(
        ctx: Any,
        both_RG: Tensor,
        down: Tensor,
        weights_R1: Tensor,
        offs_E: Tensor,
        products: Products,
    ) -> Tensor:
        ctx.shape, order = both_RG.shape, products.output_order
        if repeating():  # whose backward pass reads no output
            count = len(both_RG) if order is None else len(order.row_TK)
            return both_RG.new_empty_strided((count, down.shape[1]), (0, 0))
        hidden_RF = weighted_swiglu(both_RG, weights_R1)
        return products.forward(hidden_RF, down, offs_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        ((first, _), *_) = ctx.next_functions
        first.grad_RD = grad_RD.contiguous()  # grouped_mm refuses expanded (stride 0) gradients
        return grad_RD.new_zeros(()).expand(ctx.shape), None, None, None, None


def _first_traversal(
    x_RD: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    weights_R1: Tensor,
    offs_E: Tensor,
    both_RG: Tensor,  # gate|up of the rows, which their gradient replaces
    grad_RD: Tensor,
    of_down: Products,
    want_down: bool,
    later: bool,  # whether another traversal follows
) -> tuple[_Kept, Tensor | None]:
    """Go back to gate|up, and give the gradient of the down projection, if it is wanted."""
    grad_RF = of_down.grad_rows(grad_RD, down, offs_E)
    wanted = want_down or later
    grad_weights_R1 = weighted_swiglu_backward(both_RG, weights_R1, grad_RF, wanted)
    hidden_RF = grad_RF  # in whose place it is, if it is wanted
    grad_down = of_down.grad_weight(grad_RD, hidden_RF, offs_E) if want_down else None
    kept_RF = hidden_RF if later else None
    return _Kept(x_RD, gate_up, offs_E, kept_RF, both_RG, grad_weights_R1), grad_down
