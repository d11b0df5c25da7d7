"""FSDP2: parameters, gradients and optimizer state sharded over `fsdp`, experts over `edp`;
replicas over `dp_replicate`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from torchsft.config import InputError
from torchsft.models.language_model import DecoderLayer, LanguageModel
from torchsft.models.moe import Experts
from torchsft.parallel.compute_copies import ComputeCopies
from torchsft.parallel.float8 import gather_in_float8


def _mesh(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """Sharding over `axis`, with replicas where there are any."""
    return mesh["dp_replicate", axis] if mesh["dp_replicate"].size() > 1 else mesh[axis]


def allocate(stages: Sequence[LanguageModel], device: torch.device, offload: bool) -> None:
    """Give stages on the meta device memory and buffers their values; parameters are uninitialised,
    with `offload` on the host (pinned by FSDP).
    """
    for stage in stages:
        stage.to_empty(device="cpu" if offload else device)
        for module in stage.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        stage.init_buffers()
        if not offload:
            gather_in_float8(stage)


def _check_experts(layer: str, experts: Experts, shards: int) -> None:
    """Refuse experts whose dim 1 does not divide over the ranks that share one."""
    for key, parameter in experts.named_parameters():
        if parameter.shape[1] % shards:
            raise InputError(
                f"dim 1 of layer {layer}'s experts.{key} is {parameter.shape[1]}, which does not "
                f"divide over the {shards} ranks that share an expert (dp_shard * cp * tp / ep); "
                "raise --parallel.ep or start another number of ranks"
            )


def _is_alone(edp: DeviceMesh, masters: torch.dtype, offload: bool) -> bool:
    """Whether experts are left out of FSDP2; see `apply_fsdp`."""
    return edp.size() == 1 and masters == torch.float32 and not offload


def _own(layer: DecoderLayer, experts: Experts, compute: torch.dtype, *, keep: bool) -> None:
    """Leave experts as they are, and let them compute in a dtype."""
    if compute == torch.float32:
        return
    experts.read = ComputeCopies(compute, keep)
    if not keep and layer.recompute is None:
        experts.read.save_none(experts)


def apply_fsdp(
    model: LanguageModel,
    parameter_mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    compute: torch.dtype,
    reshard_after_forward: bool,
    offload: bool = False,
) -> None:
    """Shard `model` in place; forward and backward run in `compute`, gradients are summed in fp32.

    Not over `tp`: `gradients.sum_summands` does that behind the last microbatch.

    Units: each layer; inside it the experts (dim 1 over `edp`, as dim 0 belongs to `ep`) and, below
    fp32, the router, which stays fp32; the rest (embedding, last norm, head) is the root. While a
    layer computes, the next one is gathered; its experts are named, since FSDP2 by itself looks one
    unit ahead, which would be this layer's own experts.

    Experts that no other rank has a part of (edp 1, no replicas) are left out, as they have nothing
    to gather and nothing to sum: see parallel/compute_copies.py. Not with `offload`, which copies
    what FSDP2 has summed, nor with masters in bf16, whose gradients FSDP2 sums in fp32 beside them.

    `model` is all of it, or the part that one pipeline stage holds; the meshes are
    `World.parameter` and `World.expert`. `reshard_after_forward` frees the gathered parameters
    between forward and backward (`pipeline.reshard_after_forward`). `offload` keeps parameters and
    gradients in host memory (optim/offload.py).

    Raises:
        InputError: an expert dim does not divide over `edp` (FSDP2 shards dims other than 0
            evenly).
    """
    dense, edp = _mesh(parameter_mesh, "fsdp"), _mesh(expert_mesh, "edp")
    # Inputs are not cast: they are in `compute` already, except loss weights, which must stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"mesh": dense, "mp_policy": policy}
    options["reshard_after_forward"] = reshard_after_forward
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=dense.device_type == "cuda")
    of_experts = options | {"mesh": edp, "shard_placement_fn": lambda _: Shard(1)}
    of_router = options | {"mp_policy": dataclasses.replace(policy, param_dtype=torch.float32)}
    units: list[list[FSDPModule]] = []  # of each layer, in the order in which they are needed
    moe_layers = model.moe_layers()
    for name, layer in model.model.layers.items():
        parts, ignored = [], None
        if name in moe_layers:
            gate, experts = moe_layers[name].gate, moe_layers[name].experts
            _check_experts(name, experts, expert_mesh["edp"].size())
            masters = experts.down_proj.dtype
            if {compute, masters} != {torch.float32}:
                parts.append(fully_shard(gate, **of_router))
            if _is_alone(edp, masters, offload):
                ignored = set(experts.parameters())
                _own(layer, experts, compute, keep=not reshard_after_forward)
            else:
                parts.append(fully_shard(experts, **of_experts))
        units.append([fully_shard(layer, ignored_params=ignored, **options), *parts])
    # The root is needed again as soon as the backward pass begins: FSDP2's default (None) keeps it.
    options["reshard_after_forward"] = None if reshard_after_forward else False
    fully_shard(model, **options)
    for this, following in itertools.pairwise(units):
        this[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(this[:1] + this[:0:-1])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The one normaliser is the global batch's loss weight: FSDP only sums. gloo has no
            # PREMUL_SUM, so force SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
