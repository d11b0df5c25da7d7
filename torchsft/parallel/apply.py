"""The one place that orders what is done to a model: tensor, expert, context parallelism, number
formats, activation checkpointing, compilation, FSDP2.
"""

from collections.abc import Sequence

import torch
from torch import nn

from torchsft.config import Precision, Train
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.activation import apply_activation_checkpointing
from torchsft.parallel.blockwise import apply_blockwise
from torchsft.parallel.compile import apply_compile
from torchsft.parallel.context import apply_context_parallel
from torchsft.parallel.expert import apply_expert_parallel, node_groups
from torchsft.parallel.expert_float8 import apply_expert_float8
from torchsft.parallel.float8 import apply_float8
from torchsft.parallel.fsdp import apply_fsdp
from torchsft.parallel.tensor import apply_tensor_parallel
from torchsft.parallel.world import World


def compute_dtype(compute: str, device: torch.device) -> torch.dtype:
    """Return the dtype of hidden states and gathered parameters for a --precision.compute, or of
    parameters for --optim.masters.
    """
    is_bf16 = compute == "bf16" or (compute in ("blockwise", "float8") and device.type != "cpu")
    return torch.bfloat16 if is_bf16 else torch.float32


def quantised_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights that block-wise fp8 quantises: gathered ones; else fp32."""
    is_fp8 = precision.compute == "blockwise"
    return compute_dtype(precision.compute, device) if is_fp8 else torch.float32


def parallelize(
    # the pipeline stages that this rank holds; without a pipeline, the model
    stages: Sequence[LanguageModel],
    world: World,
    compute: torch.dtype,  # of the forward and backward pass
    *,
    masters: torch.dtype = torch.float32,  # of the parameters, but for those of routers
    activations: Train | None = None,  # what it says of them; None: all are kept
    reshard_after_forward: bool = True,  # see `apply_fsdp`
    precision: Precision | None = None,  # of products; None: that of `compute`
    offload: bool = False,  # keep parameters and gradients in host memory
    compiled: bool = False,  # compile what lies between collectives
) -> None:
    """Distribute this rank's part of a model, built on the meta device, over `world`, in place; no
    memory is allocated.

    On one rank with fp32 alone there is nothing to shard and nothing to cast, so the model is left
    as it is, unless `offload` is asked for.

    Raises:
        InputError: something does not divide over the mesh.
    """
    groups = node_groups(world)
    for stage in stages:
        for number, moe in stage.moe_layers().items():
            moe.layer = number
        if world.dense["tp"].size() > 1:
            apply_tensor_parallel(stage, world)
        apply_expert_parallel(stage, world, groups)
        if world.dense["cp"].size() > 1:
            apply_context_parallel(stage, world)
        if precision and precision.compute == "blockwise":
            apply_blockwise(
                stage,
                world.device,
                power_of_two=precision.power_of_two_scales,
                keep=not reshard_after_forward,
            )
        if precision and precision.compute == "float8":
            apply_float8(stage, world.device, precision.float8_recipe)
        if precision and precision.experts != "same":
            apply_expert_float8(stage, world.device, precision.experts, compute)
        apply_activation_checkpointing(stage, activations or Train(), world.device)
        if compiled:
            apply_compile(stage)
        if masters != torch.float32:
            cast_parameters(stage, masters)
        if world.dense.size() > 1 or {compute, masters} != {torch.float32} or offload:
            meshes = world.parameter, world.expert
            apply_fsdp(stage, *meshes, compute, reshard_after_forward, offload)


def cast_parameters(model: LanguageModel, dtype: torch.dtype) -> None:
    """Give all parameters of a model on the meta device a dtype, but for those of routers."""
    routers = {part for moe in model.moe_layers().values() for part in moe.gate.modules()}
    cast: dict[nn.Parameter, nn.Parameter] = {}  # a tied one is there twice
    for module in set(model.modules()) - routers:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in cast:
                cast[parameter] = nn.Parameter(
                    parameter.detach().to(dtype), requires_grad=parameter.requires_grad
                )
            module.register_parameter(name, cast[parameter])
