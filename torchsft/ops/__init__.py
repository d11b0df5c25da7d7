"""Operations with a gradient of their own, each beside the plain PyTorch that it replaces.

`--model.ops plain` computes a run with the plain twins (here, and the rotation and the loss in
models/), but for the experts, whose twin is `--model.experts loop`.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

_plain = False
_has_triton = importlib.util.find_spec("triton") is not None


def use_plain(on: bool) -> None:
    """Compute with the plain twins from now on, or not; for this process."""
    global _plain
    _plain = on


def plain() -> bool:
    """Whether the plain twins are to be used: when asked for, and where torch compiles, which fuses
    them and chooses itself what is kept for the backward pass.
    """
    return _plain or torch.compiler.is_compiling()


def kernels(x: Tensor) -> bool:
    """Whether Triton's kernels compute what begins with this tensor, if there are some: below fp32
    on CUDA, where triton is installed, unless the plain twins are to be used.
    """
    able = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _has_triton
    return able and not plain()


def gradients_asked_for(ctx: Any) -> list[bool]:
    """Inside the backward of an autograd Function: whether this pass computes the gradient of each
    of its tensor arguments.

    Zero-bubble pipeline schedules go through a graph twice, for activations and later for weights,
    and every Function that has both is called in both passes; `ctx.needs_input_grad` is the same in
    both.
    """

    def runs(node: Any) -> bool:
        if node is None:  # no gradient at all
            return False
        try:
            return torch._C._will_engine_execute_node(node)
        except RuntimeError:  # what it says of a leaf that `torch.autograd.grad` asks for
            return True

    return [runs(node) for node, _ in ctx.next_functions]


def accumulates(ctx: Any) -> bool:
    """Inside the backward of an autograd Function whose first argument is a leaf: whether this pass
    adds to its `.grad` (`Tensor.backward`), or returns its gradient (`torch.autograd.grad`).
    """
    (leaf, _), *_ = ctx.next_functions
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:
        return False
