"""The one place that orders what is done to a model: tensor, expert, context parallelism,
activation checkpointing, FSDP2.
"""

from collections.abc import Sequence

import torch

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
    compute: torch.dtype,  # of the forward and backward pass
    *,
    masters: torch.dtype = torch.float32,  # of parameters; routers stay fp32
    activation_checkpointing: bool = False,  # compute every layer again in the backward pass
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
        if masters != torch.float32:
            _cast(stage, masters)
        if world.dense["tp"].size() > 1:
            apply_tensor_parallel(stage, world)
        apply_expert_parallel(stage, world.expert)
        if world.dense["cp"].size() > 1:
            apply_context_parallel(stage, world)
        if activation_checkpointing:
            apply_activation_checkpointing(stage)
        if world.dense.size() > 1 or {compute, masters} != {torch.float32}:
            apply_fsdp(stage, world.parameter, world.expert, compute, reshard_after_forward)


def _cast(stage: LanguageModel, masters: torch.dtype) -> None:
    """Give all parameters but those of routers a dtype, in place.

    A router chooses by small differences, and is small. Norms and biases share an FSDP2 unit with
    matrices, hence their dtype.
    """
    routers = {p for moe in stage.moe_layers().values() for p in moe.gate.parameters()}
    for parameter in stage.parameters():
        if parameter not in routers:
            parameter.data = parameter.data.to(masters)
