"""Experts that this rank shares with no other: edp is 1, and there are no replicas.

FSDP2 on a mesh of one rank would take gradients over by two copies, a cast and a division by 1.0,
in a memory pool of its own. Here the model's parameters are the fp32 masters, split by ep alone,
and nothing stands between a gradient and `.grad`:

    copy        in the compute dtype, made where `Experts.read` asks; none where passes are in fp32
    gradient    of a step's first microbatch becomes `.grad`, cast; those of others are added to it
                in place, in fp32. So sums are those of FSDP2, bit by bit

Copies are freed as gathered parameters would be: with a pipeline they are kept for the step
(`free_copies`); without one they are made again for the backward pass, by the repetition of the
layer or, where a layer is not computed again, when autograd asks for what it has saved. A weight
pass of a zero-bubble schedule asks for gradients, which torch adds to `.grad`, in fp32 too.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from torchsft.models.decoder import local
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import Experts
from torchsft.ops import accumulates


class ComputeCopies:
    """An `Experts.read` of fp32 parameters in another dtype.

    Args:
        dtype: of the copies.
        keep: each until `free_copies`; else one is made for each call.
    """

    def __init__(self, dtype: torch.dtype, keep: bool) -> None:
        self.dtype, self.keep = dtype, keep
        self.kept: dict[nn.Parameter, Tensor] = {}
        # Of the forward pass that runs: whose copy lies in which storage (meta
        # tensors have one too, but no address of data).
        self.made: dict[int, nn.Parameter] = {}

    def __call__(self, parameter: nn.Parameter) -> Tensor:
        """Return this rank's part, in that dtype; what it adds to the gradient finds its way."""
        copy = self.kept.get(parameter)
        if copy is None:
            copy = self._copy(parameter)
            if self.keep:
                self.kept[parameter] = copy
        self.made[copy.untyped_storage()._cdata] = parameter
        return _Copy.apply(parameter, copy)

    def _copy(self, parameter: nn.Parameter) -> Tensor:
        return local(parameter.detach()).to(self.dtype)

    def save_none(self, experts: Experts) -> None:
        """Let autograd keep no copy of `experts` for the backward pass, which makes it again."""
        hooks = saved_tensors_hooks(self._pack, self._unpack)

        def begin(*_: Any) -> None:
            self.made.clear()
            hooks.__enter__()

        experts.register_forward_pre_hook(begin)
        experts.register_forward_hook(lambda *_: hooks.__exit__(), always_call=True)

    def _pack(self, saved: Tensor) -> Any:
        parameter = self.made.get(saved.untyped_storage()._cdata)
        if parameter is None:
            return saved.detach()  # the tensor itself may be of the node that keeps it
        return parameter, saved.shape, saved.stride(), saved.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        parameter, *view = packed
        return self._copy(parameter).as_strided(*view)


class _Copy(torch.autograd.Function):
    """Passes a copy on; its gradient goes to the parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, copy: Tensor) -> Tensor:
        ctx.parameter = parameter
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        parameter = ctx.parameter
        if parameter.grad is not None and accumulates(ctx):
            local(parameter.grad).add_(grad)
            return None, None
        # In a DTensor autograd would leave other strides than the parameter's (those of fp8), and
        # fused optimizers go through memory.
        grad = grad.to(parameter.dtype, memory_format=torch.contiguous_format)
        return _like(parameter, grad), None


def _like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Return this rank's part of a gradient, placed as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def free_copies(models: Iterable[LanguageModel]) -> None:
    """Free what is kept for a step: the parameters are about to change."""
    for model in models:
        for moe in model.moe_layers().values():
            if isinstance(moe.experts.read, ComputeCopies):
                moe.experts.read.kept.clear()
