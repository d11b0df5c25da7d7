"""Whether a rank's share of weights, gradients and moments fits into its device, into its host, and
into the blocks of moments in int8.
"""

import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchsft.config import Config, InputError, Optim
from torchsft.config.optim_options import BLOCK
from torchsft.models.decoder import local
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import MoE
from torchsft.parallel.collectives import gather_objects
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
        optim: of the run; Muon keeps one moment of its matrices, offload the shards that FSDP
            gathers (of routers fp32, counted like the others) and, until replicas sum them, the
            gradients that microbatches have summed.
        fp8: whether fp8 copies are kept beside gathered parameters, one and its transpose.

    Returns:
        Bytes that more data ranks would share: weight, gradient and moments, or of a frozen
        parameter the weight. And bytes that they would not: where gathered parameters are
        kept for a whole step, these, in `compute`, and their fp32 gradients, which are scattered
        behind the last microbatch (so that they stand in for the sharded ones); of experts that are
        never gathered (parallel/compute_copies.py) the copies alone.
    """
    sharded = 0 if optim.offload else held_moments(model, optim)
    gathered = 0
    for parameter in model.parameters():
        weight = parameter.dtype.itemsize
        trained = parameter.requires_grad
        keeps_gathered = not reshard_after_forward and _is_gathered(parameter)
        each = weight
        if optim.offload:
            each = compute.itemsize
            if not keeps_gathered and trained and has_replicas(parameter):
                each += FP32
        elif trained and not keeps_gathered:
            each += weight  # the gradient
        sharded += each * local(parameter).numel()
        if keeps_gathered:
            each = compute.itemsize + FP32 * trained + 2 * fp8
            gathered += each * gathered_elements(parameter)
        elif not reshard_after_forward:
            each = compute.itemsize * (compute != parameter.dtype) + 2 * fp8
            gathered += each * local(parameter).numel()
    return math.ceil(sharded), math.ceil(gathered)


def held_moments(model: nn.Module, optim: Optim) -> int:
    """Count the bytes of this rank's moments."""
    matrices = model.matrices() if optim.kind == "muon" else {}
    return math.ceil(
        sum(
            moment_bytes(optim, parameter, name in matrices) * local(parameter).numel()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        )
    )


def moment_bytes(optim: Optim, parameter: nn.Parameter, is_muons: bool) -> float:
    """Return the bytes of an element's moments."""
    if is_muons:
        return FP32
    vector = parameter.ndim < 2
    each = {"fp32": FP32, "bf16": 2, "int8": FP32 if vector else 1 + FP32 / BLOCK}
    return 2 * each[optim.moments]


def check_moments(model: nn.Module) -> None:
    """Refuse moments in int8 of a matrix whose rows are split within a block: its blocks would be
    others in each layout.
    """
    for name, parameter in model.named_parameters():
        width, whole = local(parameter).shape[-1], parameter.shape[-1]
        splits = parameter.ndim > 1 and width != whole and width % BLOCK
        if splits and parameter.requires_grad:
            raise InputError(
                f"--optim.moments int8 has blocks of {BLOCK} entries of a row, but ranks share "
                f"rows of {name} in parts of {width}; lower --parallel.tp, or use bf16"
            )


def _is_gathered(parameter: nn.Parameter) -> bool:
    """Whether FSDP2 gathers it: not experts that are split by ep alone."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names != ("ep",)


def has_replicas(parameter: nn.Parameter) -> bool:
    """Whether FSDP sums gradients over replicas, behind the last microbatch."""
    if not isinstance(parameter, DTensor):
        return False
    return "dp_replicate" in (parameter.device_mesh.mesh_dim_names or ())


def host_bytes(model: nn.Module, is_pinned: bool) -> int:
    """Count the host memory of this rank with --optim.offload: fp32 weights, and of what is trained
    gradients and two moments.

    Args:
        model: this rank's part, sharded; on any device.
        is_pinned: whether what travels is pinned.
    """
    total = 0
    for parameter in model.parameters():
        size = FP32 * local(parameter).numel()
        travelling = pinned_bytes(size, is_pinned)
        total += travelling
        if parameter.requires_grad:
            total += travelling + 2 * size
    return total


def pinned_bytes(size: int, is_pinned: bool) -> int:
    """Return what a tensor of a size takes on the host: torch rounds pinned ones up to a power of
    two.
    """
    return 1 << (size - 1).bit_length() if is_pinned and size else size


def activation_bytes(
    model: LanguageModel, config: Config, compute: torch.dtype, in_flight: int, is_pinned: bool
) -> int:
    """Count the host memory that this rank needs at least with --train.activation-offload: the
    input of each checkpointed layer that is trained, what attention returns and, of rows spread
    evenly over experts, the products with gate and up.

    Args:
        model: this rank's part; on any device.
        config: of the run.
        compute: dtype of hidden states.
        in_flight: microbatches.
        is_pinned: whether that memory is pinned.
    """
    train, parallel = config.train, config.parallel
    tokens = train.micro_batch_size * config.data.seq_len // (parallel.cp * parallel.tp)
    total, hidden_size = 0, model.config.hidden_size
    for layer in model.model.layers.values():
        if layer.recompute is None or not any(p.requires_grad for p in layer.parameters()):
            continue
        widths = [hidden_size]
        if train.activation_checkpointing == "selective":
            widths.append(layer.self_attn.o_proj.weight.shape[1])
        if train.selective_products and isinstance(layer.mlp, MoE):
            gate_up = math.prod(layer.mlp.experts.gate_up_proj.shape[1:]) // hidden_size
            widths.append(layer.mlp.gate.top_k * gate_up)
        for width in widths:
            total += pinned_bytes(tokens * width * compute.itemsize, is_pinned)
    return in_flight * total


def free_host_bytes() -> int:
    """Return the memory that this host, or the control group of this container, can still give."""
    free = 1024 * _number("/proc/meminfo", r"MemAvailable:\s+(\d+)")
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            taken = _number(f"{folder}/{used}")
            cached = _number(f"{folder}/memory.stat", r"\binactive_file (\d+)")
            free = min(free, _number(f"{folder}/{limit}") - taken + cached)
        except (OSError, TypeError):  # no such group; "max" is no number
            continue
    return free


def _number(file: str, pattern: str = r"(\d+)") -> int:
    return int(re.search(pattern, Path(file).read_text())[1])


def check_host_memory(bytes_of: Mapping[str, int]) -> None:
    """Refuse what options would keep on this host, where that is too much; collective.

    Args:
        bytes_of: this rank's, of each option.

    Raises:
        InputError: what the ranks of this host would hold and what it has, in GB (10^9 bytes).
    """
    host, free = platform.node(), free_host_bytes()
    needs = gather_objects((host, sum(bytes_of.values())))
    here = [need for name, need in needs if name == host]
    if sum(here) <= free:
        return
    raise InputError(
        f"{' and '.join(bytes_of)} would keep at least {sum(here) / 1e9:.1f} GB on host {host} "
        f"(ranks there: {len(here)}), but it has {free / 1e9:.1f} GB free; start ranks on more "
        "hosts or leave the option out"
    )


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
    model: LanguageModel,
    compute: torch.dtype,
    reshard_after_forward: bool,
    config: Config,
    world: World,
    in_flight: int,
) -> None:
    """Refuse a model whose share does not fit into this rank's device, or what it keeps on the host
    does not fit there, or whose moments do not fit into blocks, before any is allocated.

    Args:
        model: this rank's part, sharded; on the meta device.
        compute: dtype of hidden states and gathered parameters.
        reshard_after_forward: whether gathered parameters are freed between the passes.
        config: of the run.
        world: the ranks.
        in_flight: microbatches whose activations are kept.

    Raises:
        InputError: what the rank would hold and what its device has, in GB (10^9 bytes).
    """
    optim, on_host, is_pinned = config.optim, {}, world.device.type == "cuda"
    if optim.moments == "int8":
        check_moments(model)
    if optim.offload:
        on_host["--optim.offload"] = host_bytes(model, is_pinned)
    if config.train.activation_offload:
        kept = activation_bytes(model, config, compute, in_flight, is_pinned)
        on_host["--train.activation-offload"] = kept
    if on_host:
        check_host_memory(on_host)
    available = device_bytes(world.device)
    fp8 = config.precision.compute == "blockwise"
    sharded, gathered = held_bytes(model, compute, reshard_after_forward, optim, fp8)
    if available is None or sharded + gathered <= available:
        return
    remedy = "raise --parallel.pp, --parallel.ep or --parallel.tp"
    if gathered < available:
        ranks = math.ceil(world.size * sharded / (available - gathered))
        remedy = f"start at least {ranks} ranks"
    raise InputError(
        f"rank {world.rank} would hold {(sharded + gathered) / 1e9:.1f} GB of weights, gradients "
        f"and moments, but its device has {available / 1e9:.1f} GB; {remedy}"
    )
