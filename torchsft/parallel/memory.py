"""Whether a rank's share of weights, gradients and moments fits into its device."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchsft.config import InputError
from torchsft.models.decoder import local
from torchsft.parallel.world import World

# Bytes of both moments per parameter (of two or more dims), by --optim.moments: int8 codes have an
# fp32 scale for each block of 128.
MOMENTS = {"fp32": 8.0, "bf16": 4.0, "int8": 2 * (1 + 4 / 128)}


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of a CUDA device; None for a CPU, which can swap."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def held_bytes(
    model: nn.Module, compute: torch.dtype, reshard_after_forward: bool, moments: str = "fp32"
) -> tuple[float, float]:
    """Count the device memory that this rank needs for its share of the parameters through a step;
    activations and buffers come on top.

    Args:
        model: this rank's part, sharded; on any device.
        compute: dtype of gathered parameters.
        reshard_after_forward: whether gathered parameters are freed between the passes.
        moments: their format (`MOMENTS`).

    Returns:
        Bytes that more data ranks would share: weight, gradient (in the weight's dtype) and two
        moments, or of a frozen parameter the weight. And bytes that they would not: where gathered
        parameters are kept for a whole step, these, in `compute`, and their fp32 gradients, which
        are scattered behind the last microbatch (so that they stand in for the sharded ones).
    """
    sharded = gathered = 0.0
    for parameter in model.parameters():
        trained, weight = parameter.requires_grad, parameter.itemsize
        with_moments = weight + (MOMENTS[moments] if trained else 0)
        if reshard_after_forward or not isinstance(parameter, DTensor):
            each = with_moments + (weight if trained else 0)
            sharded += each * local(parameter).numel()
            continue
        sharded += with_moments * local(parameter).numel()
        each = compute.itemsize + (4 if trained else 0)
        gathered += each * gathered_elements(parameter)
    return sharded, gathered


def gathered_elements(parameter: DTensor) -> int:
    """Count the elements of a parameter that this rank has once FSDP has gathered it: only tensor
    and expert parallelism still split it.
    """
    mesh = parameter.device_mesh
    ranks = 1
    for axis, size, placement in zip(
        mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True
    ):
        if axis in ("tp", "ep") and placement.is_shard():
            ranks *= size
    return parameter.numel() // ranks


def check_memory(
    model: nn.Module,
    compute: torch.dtype,
    reshard_after_forward: bool,
    world: World,
    moments: str = "fp32",
) -> None:
    """Refuse a model whose share does not fit into this rank's device, before any is allocated.

    Raises:
        InputError: what the rank would hold and what its device has, in GB (10^9 bytes).
    """
    available = device_bytes(world.device)
    sharded, gathered = held_bytes(model, compute, reshard_after_forward, moments)
    if available is None or sharded + gathered <= available:
        return
    remedy = "raise --parallel.pp, --parallel.ep or --parallel.tp"
    if gathered < available:
        ranks = math.ceil(world.size * sharded / (available - gathered))
        remedy = f"start at least {ranks} ranks"
    needed = f"{(sharded + gathered) / 1e9:.1f} GB of weights, gradients and moments"
    raise InputError(
        f"rank {world.rank} would hold {needed}, but its device has {available / 1e9:.1f} GB; "
        f"{remedy}"
    )
