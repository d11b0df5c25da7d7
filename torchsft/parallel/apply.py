"""The one place that orders what is done to a model: expert parallelism, then FSDP2."""

from __future__ import annotations

import torch
from torch import nn

from torchsft.parallel.expert import apply_expert_parallel
from torchsft.parallel.fsdp import apply_fsdp
from torchsft.parallel.world import World


def parallelize(model: nn.Module, world: World, compute: torch.dtype) -> None:
    """Distribute a model that was built on the meta device over `world`, in place; no memory is allocated.

    Args:
        model: with `model.layers`, and in MoE layers `mlp.experts`, `mlp.gate` and `mlp.exchange`.
        compute: dtype of the forward and backward pass; parameters stay fp32.

    Raises:
        InputError: the experts do not divide over the mesh.
    """
    apply_expert_parallel(model, world.expert)
    apply_fsdp(model, world.dense, world.expert, compute)
