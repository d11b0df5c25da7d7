"""SwiGLU feed-forward networks that save little for the backward pass.

    swiglu            silu(gate) * up; replaces F.silu(gate) * up, which also saves silu(gate)
    grouped_swiglu    down(silu(gate(x)) * up(x)) for rows sorted by expert, with `F.grouped_mm`;
                      saves x and gate|up, recomputes the rest. Its plain twin is
                      `grouped_swiglu_reference`, one matrix product per expert.

Shape suffixes: R rows, D width, F expert width, E experts held here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.ops import plain, wanted


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
    # int32; expert e owns the rows offs_E[e - 1] to offs_E[e]. offs_E[-1] must be R
    offs_E: Tensor,
) -> Tensor:
    """Apply each expert's SwiGLU network to its rows: y_RD, in the dtype of x_RD."""
    if x_RD.shape[0] == 0:  # a rank that receives no rows: kernels need not support that
        return x_RD + 0 * (gate_up.sum() + down.sum())
    return _GroupedSwiglu.apply(x_RD, gate_up, down, offs_E)


def grouped_swiglu_reference(x_RD: Tensor, gate_up: Tensor, down: Tensor, offs_E: Tensor) -> Tensor:
    """`grouped_swiglu` in plain PyTorch, one expert after the other (reads offs_E on the host)."""
    lengths = offs_E.diff(prepend=offs_E.new_zeros(1)).tolist()
    outputs = []
    for rows, expert_gate_up, expert_down in zip(x_RD.split(lengths), gate_up, down, strict=True):
        gate, up = F.linear(rows, expert_gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(swiglu_reference(gate, up), expert_down))
    return torch.cat(outputs)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, gate_up: Tensor, down: Tensor, offs_E: Tensor) -> Tensor:
        both = F.grouped_mm(x_RD, gate_up.mT, offs=offs_E)
        gate, up = both.chunk(2, dim=-1)
        y_RD = F.grouped_mm(F.silu(gate).mul_(up), down.mT, offs=offs_E)
        # Only the gradient of gate_up reads x: frozen experts do not keep it.
        ctx.save_for_backward(
            x_RD if ctx.needs_input_grad[1] else None, gate_up, down, offs_E, both
        )
        ctx.due, ctx.kept = ctx.needs_input_grad, None
        return y_RD

    @staticmethod
    def backward(
        ctx: Any, grad_RD: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        want_x, want_gate_up, want_down, _ = wants = wanted(ctx)
        # what later passes will ask for
        ctx.due = [due and not want for due, want in zip(ctx.due, wants, strict=True)]
        grad_RD = grad_RD.contiguous()  # grouped_mm refuses expanded (stride 0) gradients
        if ctx.kept is None:
            x_RD, gate_up, down, offs_E, both = ctx.saved_tensors
            gate, up = both.chunk(2, dim=-1)
            grad_hidden = F.grouped_mm(grad_RD, down, offs=offs_E)
            activated = F.silu(gate)
            grad_activated = grad_hidden * up
            grad_up = grad_hidden.mul_(activated)
            hidden = activated.mul_(up)
            if any(ctx.due):
                ctx.kept = x_RD, gate_up, offs_E, hidden, both
            grad_down = F.grouped_mm(grad_RD.mT, hidden, offs=offs_E) if want_down else None
            del hidden, activated
            # The gradient of gate|up takes the place of gate|up, which nothing reads after this (a
            # second backward through the same graph is refused by autograd's version check).
            torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=gate)
            up.copy_(grad_up)
            del grad_activated, grad_up, grad_hidden
        else:
            x_RD, gate_up, offs_E, hidden, both = ctx.kept
            if not any(ctx.due):
                ctx.kept = None
            grad_down = F.grouped_mm(grad_RD.mT, hidden, offs=offs_E) if want_down else None
        grad_x_RD = F.grouped_mm(both, gate_up, offs=offs_E) if want_x else None
        grad_gate_up = F.grouped_mm(both.mT, x_RD, offs=offs_E) if want_gate_up else None
        # An expert without rows has no terms to add up; some kernels leave its gradient as it was
        # in memory (pytorch issue 172439).
        empty_E11 = (offs_E.diff(prepend=offs_E.new_zeros(1)) == 0).view(-1, 1, 1)
        for gradient in (grad_gate_up, grad_down):
            if gradient is not None:
                gradient.masked_fill_(empty_E11, 0)
        return grad_x_RD, grad_gate_up, grad_down, None
