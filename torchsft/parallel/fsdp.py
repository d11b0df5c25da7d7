"""FSDP2: parameters, gradients and optimizer state sharded over the dense mesh, experts over the expert mesh."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from torchsft.config import InputError


def apply_fsdp(model: nn.Module, dense_mesh: DeviceMesh, expert_mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Shard `model` in place; forward and backward run in `compute`, gradients are summed in fp32.

    Units: each layer; inside it the experts (dim 1 over `edp`, as dim 0 belongs to `ep`) and, below fp32, the router, which
    stays fp32; the rest (embedding, last norm, head) is the root. On one rank in fp32 there is nothing to shard and nothing to
    cast, so the model is left as it is.

    Raises:
        InputError: an expert dim does not divide over `edp` (FSDP2 shards dims other than 0 evenly).
    """
    shard, edp = dense_mesh["dp_shard"], expert_mesh["edp"]
    if dense_mesh.size() == 1 and compute == torch.float32:
        return
    # Inputs are not cast: they are in `compute` already, except loss weights, which must stay fp32.
    policy, router_policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for dtype in (compute, torch.float32)
    )
    for name, layer in model.model.layers.items():
        mlp = layer.mlp
        if hasattr(mlp, "experts"):
            for key, parameter in mlp.experts.named_parameters():
                if parameter.shape[1] % edp.size():
                    raise InputError(
                        f"dim 1 of layer {name}'s experts.{key} is {parameter.shape[1]}, which does not divide over the "
                        f"{edp.size()} ranks that share an expert (dp_shard * cp * tp / ep); raise --parallel.ep or start "
                        "another number of ranks"
                    )
            fully_shard(mlp.experts, mesh=edp, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
            if compute != torch.float32:
                fully_shard(mlp.gate, mesh=shard, mp_policy=router_policy)
        fully_shard(layer, mesh=shard, mp_policy=policy)
    fully_shard(model, mesh=shard, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The one normaliser is the global batch's loss weight: FSDP only sums. gloo has no PREMUL_SUM, so force SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
