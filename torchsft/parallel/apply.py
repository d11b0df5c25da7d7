"""The one place that orders what is done to a model: tensor, expert, context parallelism,
activation checkpointing, FSDP2.
"""

from collections.abc import Sequence

import torch

from torchsft.config import Train
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.activation import apply_activation_checkpointing
from torchsft.parallel.context import apply_context_parallel
from torchsft.parallel.expert import apply_expert_parallel
from torchsft.parallel.fsdp import apply_fsdp
from torchsft.parallel.tensor import apply_tensor_parallel
from torchsft.parallel.world import World


def parallelize(
    # the pipeline stages that this rank holds; without a pipeline, the model
    stages: Sequence[LanguageModel],
    world: World,
    compute: torch.dtype,  # of the forward and backward pass; parameters stay fp32
    *,
    activations: Train | None = None,  # what it says of them; None: all are kept
    reshard_after_forward: bool = True,  # see `apply_fsdp`
) -> None:
    """Distribute this rank's part of a model, built on the meta device, over `world`, in place; no
    memory is allocated.

    On one rank in fp32 there is nothing to shard and nothing to cast, so the model is left as it
    is.

    Raises:
        InputError: something does not divide over the mesh.
    """
    for stage in stages:
        if world.dense["tp"].size() > 1:
            apply_tensor_parallel(stage, world)
        apply_expert_parallel(stage, world.expert)
        if world.dense["cp"].size() > 1:
            apply_context_parallel(stage, world)
        apply_activation_checkpointing(stage, activations or Train())
        if world.dense.size() > 1 or compute != torch.float32:
            apply_fsdp(stage, world.parameter, world.expert, compute, reshard_after_forward)
