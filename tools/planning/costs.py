"""Seconds of what blocks do (blocks.py), on a kind of GPU (gpus.py).

    a kernel        max(FLOPs / (peak x share by shape), bytes / (bandwidth x share)) + KERNEL
    a collective    max(bytes within nodes / NVLink, bytes between nodes / network), x share, and a
                    latency for each doubling of its ranks
    a pass          kernels one after the other, collectives as `seconds_of` says; or the host's
                    time to launch it, where that is longer

Shares are those of `Gpu.efficiency`, which a file can change, times one by shape, which here is
a formula (`shape_share`); products that `tools/benchmark.py gpu` has measured correct it for shapes
near theirs. What is assumed is said where it stands, and listed by `assumptions`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.planning.gpus import Gpu, Measured
from tools.planning.operations import (
    ATTENTION,
    GROUPED,
    MEMORY,
    PRODUCT,
    WAIT,
    Operation,
    Operations,
)
from torchsft.config import InputError

# Seconds between two kernels on a device, and that a host takes to launch one (autograd and FSDP2's
# hooks included); compiled regions are launched together, CUDA graphs all at once.
KERNEL = 2.5e-6
LAUNCH = 8e-6
COMPILED = 0.6  # of the launches
# Seconds in which a device has nothing to do where the host has waited for it.
REFILL = 40e-6
# Names of parts of a step.
PRODUCTS, OF_ATTENTION, OF_MEMORY = "matrix products", "attention", "memory-bound operations"
EXCHANGE, COLLECTIVES, HOST = "exposed exchange", "exposed collectives", "launches and waits"


@dataclass(frozen=True)
class Software:
    """What software does that decides how long a step takes; by default torchsft's own.

    Attributes:
        fa3: attention is FlashAttention 3 (its package is installed; Hopper).
        deepep: rows go to experts by DeepEP's kernels: at the speed of links, without a wait of the
            host.
        cuda_graphs: launches cost nothing.
        forced_balance: experts receive the same rows.
        hidden_exchange: rows travel to experts while another microbatch is computed, as in
            DeepSeek's DualPipe.
        compiled: `--model.compile`.
    """

    fa3: bool = False
    deepep: bool = False
    cuda_graphs: bool = False
    forced_balance: bool = False
    hidden_exchange: bool = False
    compiled: bool = False


# Named options of --software, and what happens without them.
OPTIONS = {
    "fa3": "FlashAttention 2 computes attention, unless flash_attn_interface is installed",
    "deepep": "NCCL's all-to-all carries rows, at two levels, and the host waits for their number",
    "cuda-graphs": "the host launches every kernel",
    "forced-balance": "tokens go where the router sends them",
    "hidden-exchange": "rows travel beside shared experts alone",
}


def software_of(names: Sequence[str], gpu: Gpu) -> Software:
    """Return what the named options say.

    Raises:
        InputError: there is no such option, or it is not for this GPU.
    """
    for name in names:
        if name not in OPTIONS:
            raise InputError(
                f"--software {name} is not known; those known are {', '.join(OPTIONS)}"
            )
    if "fa3" in names and gpu.capability != (9, 0):
        raise InputError(
            f"--software fa3 is for GPUs of compute capability 9.0, but {gpu.name} has "
            f"{gpu.compute_capability}; leave it out"
        )
    return Software(**{name.replace("-", "_"): True for name in names})


def shape_share(m: int, n: int, k: int) -> float:
    """Return the share of its largest speed that a product of [m, k] x [k, n] reaches: tiles of 128
    x 128 that are not full, a short inner loop, and (by the cube root of m n k) few tiles.

    Assumed; with KERNEL an H100's 989 TFLOP/s x 0.72 give 340 TFLOP/s at 1024, 590 at 2048 and 670
    at 4096.
    """
    full = m / (128 * math.ceil(m / 128)) * n / (128 * math.ceil(n / 128))
    size = (m * n * k) ** (1 / 3)
    return full * k / (k + 64) * size / (size + 200)


def product_share(operation: Operation, gpu: Gpu) -> float:
    """Return the share of the peak that a product reaches: assumed, and corrected by measured ones
    of its dtype that are near, each by the square of its distance in octaves of m, n and k (an
    assumed one counts as if it were two octaves away).
    """
    m, n, k, *experts = operation.shape
    total = (m * max(experts), n, k) if experts else (m, n, k)
    share = gpu.efficiency[f"product_{operation.dtype}"] * shape_share(*total)
    if experts:
        rows = m / (128 * math.ceil(m / 128)) if m else 1.0
        share *= gpu.efficiency["grouped"] * max(rows, 0.05)
    weights, corrections = 0.25, 0.0
    for each in gpu.products:
        if each.dtype != operation.dtype or bool(each.experts) != bool(experts):
            continue
        pairs = zip((each.m, each.n, each.k), (m, n, k), strict=True)
        distance = sum(math.log2(max(a, 1) / max(b, 1)) ** 2 for a, b in pairs)
        weight = 1 / (distance + 0.01)
        weights += weight
        corrections += weight * math.log(each.share / _assumed(each, gpu))
    return min(share * math.exp(corrections / weights), 1.0)


def _assumed(measured: Measured, gpu: Gpu) -> float:
    """Return what would be assumed of a product that was measured."""
    shape = (measured.m, measured.n, measured.k)
    shape += (measured.experts,) if measured.experts else ()
    alone = Gpu(**{**vars(gpu), "products": ()})
    kind = GROUPED if measured.experts else PRODUCT
    return product_share(Operation(kind, shape=shape, dtype=measured.dtype), alone)


def attention_share(operation: Operation, gpu: Gpu, software: Software, backward: bool) -> float:
    """Return the share of the peak that attention reaches in documents of a length: half of that of
    long ones at 300 tokens (from published curves: 309 of 370 TFLOP/s at 512 without a mask, of
    which causal ones have half the work and more edges).
    """
    length = operation.shape[3]
    name = "fa3" if software.fa3 else "attention"
    share = gpu.efficiency[f"{name}_{'backward' if backward else 'forward'}"]
    return share * length / (length + 300)


def kernel_seconds(operation: Operation, gpu: Gpu, software: Software, backward: bool) -> float:
    """Return the seconds of a kernel."""
    seconds = operation.bytes / (gpu.memory_bandwidth * gpu.efficiency["memory"])
    if operation.kind in (PRODUCT, GROUPED):
        peak = gpu.peak_flops.get(operation.dtype)
        if peak is None:
            raise InputError(
                f"the run multiplies in {operation.dtype}, of which {gpu.name} has none; use "
                "--precision.compute bf16 and --precision.experts same"
            )
        if operation.flops:
            seconds = max(seconds, operation.flops / (peak * product_share(operation, gpu)))
    elif operation.kind == ATTENTION:
        share = attention_share(operation, gpu, software, backward)
        seconds = max(seconds, operation.flops / (gpu.peak_flops["bf16"] * share))
    return seconds + KERNEL


def collective_seconds(operation: Operation, gpu: Gpu, software: Software) -> float:
    """Return the seconds of a collective by bytes that a rank sends, and where its ranks are.

    Rings cross each node's border once, on all ports of the nodes' ranks together; rows of an
    all-to-all go straight.
    """
    ranks, size = len(operation.ranks), operation.bytes
    nodes = len({rank // gpu.ranks_per_node for rank in operation.ranks})
    local = ranks / nodes
    inside, outside = (
        getattr(gpu, f"{where}_bandwidth") * gpu.efficiency[where] for where in ("node", "network")
    )
    latency = gpu.latency_seconds["network" if nodes > 1 else "node"]
    if operation.kind == "all-to-all":
        leaving = (ranks - local) / max(ranks - 1, 1)
        reached = gpu.efficiency["exchange"]
        if software.deepep:
            inside, outside = gpu.node_bandwidth, gpu.network_bandwidth
            reached = gpu.efficiency["deepep"]
        seconds = max(size * leaving / outside, size * (1 - leaving) / inside) / reached
        return seconds + latency
    whole = size * ranks / max(ranks - 1, 1)
    between = whole * (nodes - 1) / nodes / local
    seconds = max(between / outside, size / inside if local > 1 else 0.0)
    return seconds + latency * math.log2(max(ranks, 2))


Parts = Counter[str]  # seconds of a pass, by part; negative ones of what ONCE does less often


def seconds_of(operations: Operations, gpu: Gpu, software: Software, backward: bool) -> Parts:
    """Return the seconds of a pass through a block, by part.

    Hidden are rows on their way to experts, as far as kernels run meanwhile (shared experts, and
    what a backward pass computes again); FSDP2's collectives, as far as kernels and no other
    collectives run; with `hidden_exchange` rows behind all kernels. All others are waited for.
    """
    parts: Parts = Counter()
    beside: Counter[int] = Counter()  # kernels, by flight
    flights: Counter[int] = Counter()
    network = hidden = 0.0
    kernels = waits = 0
    names = {PRODUCT: PRODUCTS, GROUPED: PRODUCTS, ATTENTION: OF_ATTENTION, MEMORY: OF_MEMORY}
    for operation, count in operations.items():
        if operation.kind == WAIT:
            waits += count
        elif operation.kind in names:
            seconds = count * kernel_seconds(operation, gpu, software, backward)
            parts[names[operation.kind]] += seconds
            beside[operation.flight] += seconds
            kernels += count
        else:
            seconds = count * collective_seconds(operation, gpu, software)
            network += seconds
            if operation.fsdp:
                hidden += seconds
            elif operation.kind == "all-to-all":
                flights[operation.flight] += seconds
            else:
                parts[COLLECTIVES] += seconds
    computed = sum(parts.values()) - parts[COLLECTIVES]
    if software.hidden_exchange:
        flights, beside = Counter({1: flights.total()}), Counter({1: computed})
    for flight, seconds in flights.items():
        among = beside[flight] if flight else 0.0
        parts[EXCHANGE] += max(0.0, seconds - among)
    parts[COLLECTIVES] += max(0.0, network - sum(parts.values())) if hidden else 0.0
    launches = kernels * LAUNCH * (COMPILED if software.compiled else 1)
    if software.cuda_graphs:
        launches = 0.0
    parts[HOST] = max(0.0, launches - sum(parts.values()))
    parts[HOST] += 0.0 if software.deepep else waits * REFILL
    return parts


def once_seconds(operations: Operations, gpu: Gpu, software: Software) -> tuple[float, float]:
    """Return the seconds of what a step does once for a block: gathering, and summing gradients;
    kernels that copy for them are counted with each.
    """
    found = {True: 0.0, False: 0.0}
    kernels = 0.0
    for operation, count in operations.items():
        if operation.kind in (MEMORY, PRODUCT, GROUPED, ATTENTION):
            kernels += count * kernel_seconds(operation, gpu, software, False)
        elif operation.kind != WAIT:
            gathers = operation.kind == "all-gather"
            found[gathers] += count * collective_seconds(operation, gpu, software)
    half = max(kernels, 0.0) / 2
    return max(found[True], 0.0) + half, max(found[False], 0.0) + half


def weight_seconds(operations: Operations, gpu: Gpu, software: Software) -> float:
    """Return the seconds of the gradients of weights in a backward pass."""
    return sum(
        count * kernel_seconds(operation, gpu, software, True)
        for operation, count in operations.items()
        if operation.weights
    )


def together(parts: Sequence[Mapping[str, float]]) -> Parts:
    """Return sums by part."""
    total: Parts = Counter()
    for each in parts:
        total.update(each)
    return total
