"""Whether a rank's share of weights, gradients and moments fits into its device."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchsft.config import BLOCK, InputError, Optim
from torchsft.models.decoder import local
from torchsft.parallel.world import World

FP32 = 4  # bytes of an element of a weight, a gradient or a moment


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of a CUDA device; None for a CPU, which can swap."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def held_bytes(
    model: nn.Module,
    compute: torch.dtype,
    reshard_after_forward: bool,
    optim: Optim,
    fp8: bool = False,
) -> tuple[int, int]:
    """Count the device memory that this rank needs for its share of the parameters through a step;
    activations and buffers come on top.

    Args:
        model: this rank's part, sharded; on any device.
        compute: dtype of gathered parameters.
        reshard_after_forward: whether gathered parameters are freed between the passes.
        optim: of the run; Muon keeps one moment of its matrices.
        fp8: whether fp8 copies are kept beside gathered parameters, one and its transpose.

    Returns:
        Bytes that more data ranks would share: weight, gradient and moments, or of a frozen
        parameter the weight. And bytes that they would not: where gathered parameters are
        kept for a whole step, these, in `compute`, and their fp32 gradients, which are scattered
        behind the last microbatch (so that they stand in for the sharded ones).
    """
    sharded = gathered = 0.0
    matrices = model.matrices() if optim.kind == "muon" else {}
    for name, parameter in model.named_parameters():
        weight = parameter.dtype.itemsize
        trained = parameter.requires_grad
        keeps_gathered = not reshard_after_forward and isinstance(parameter, DTensor)
        each = weight
        if trained:
            each += moment_bytes(optim, parameter, name in matrices)
            each += 0 if keeps_gathered else weight  # the gradient
        sharded += each * local(parameter).numel()
        if keeps_gathered:
            each = compute.itemsize + FP32 * trained + 2 * fp8
            gathered += each * gathered_elements(parameter)
    return math.ceil(sharded), math.ceil(gathered)


def moment_bytes(optim: Optim, parameter: nn.Parameter, is_muons: bool) -> float:
    """Return the bytes of an element's moments."""
    if is_muons:
        return FP32
    vector = parameter.ndim < 2
    each = {"fp32": FP32, "bf16": 2, "int8": FP32 if vector else 1 + FP32 / BLOCK}
    return 2 * each[optim.moments]


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
    optim: Optim,
    world: World,
    fp8: bool,
) -> None:
    """Refuse a model whose share does not fit into this rank's device, before any is allocated.

    Raises:
        InputError: what the rank would hold and what its device has, in GB (10^9 bytes).
    """
    available = device_bytes(world.device)
    sharded, gathered = held_bytes(model, compute, reshard_after_forward, optim, fp8)
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
