"""Part of `tools/benchmark.py gpu`: the share of a device's peak that matrix products reach, of the
shapes of published models' layers and of squares.

`python tools/plan.py --gpu FILE.yaml` reads the report (`products: FILE.json` in that file) and
corrects by it what it assumes of products of like shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.precision.float8 import CAPABILITY, E4M3

BF16, FP8 = "bf16", "fp8"


class Shape(NamedTuple):
    """[m, k] x [k, n], or of each of so many experts [m, k] x [k, n]."""

    m: int
    n: int
    k: int
    experts: int = 0


SQUARES = (1024, 2048, 4096, 8192)
# Outputs and inputs of weights, which multiply 4,096 tokens.
DENSE = (
    # DeepSeek-V3: latents, heads, output
    (1536, 7168),
    (24576, 1536),
    (576, 7168),
    (32768, 512),
    (7168, 16384),
    # its dense network and a shared expert
    (36864, 7168),
    (7168, 18432),
    (2048, 7168),
    # Qwen3-30B-A3B and Moonlight
    (4096, 2048),
    (2048, 4096),
    (3072, 2048),
    (2048, 11264),
)
# Experts of a rank, rows of each, outputs and inputs.
EXPERTS = (
    # DeepSeek-V3 at a mean load on 16 and on 32 ranks
    (8, 1024, 4096, 7168),
    (8, 1024, 7168, 2048),
    (8, 3072, 4096, 7168),
    (8, 3072, 7168, 2048),
    # Qwen3-30B-A3B
    (16, 512, 1536, 2048),
    (16, 512, 2048, 768),
    (16, 2048, 1536, 2048),
    (16, 2048, 2048, 768),
)
SHAPES = [
    *(Shape(size, size, size) for size in SQUARES),
    *(Shape(4096, outputs, inputs) for outputs, inputs in DENSE),
    *(Shape(rows, outputs, inputs, experts) for experts, rows, outputs, inputs in EXPERTS),
]


def product(shape: Shape, dtype: str, device: torch.device) -> Callable[[], Tensor]:
    """Return what multiplies."""
    m, n, k, experts = shape
    if experts:
        x = torch.randn(m * experts, k, device=device, dtype=torch.bfloat16)
        weight = torch.randn(experts, n, k, device=device, dtype=torch.bfloat16)
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * m
        return lambda: F.grouped_mm(x, weight.mT, offs=ends)
    x, weight = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    if dtype == BF16:
        return lambda: x @ weight.mT
    # GPUs alone, and never run there yet
    x8, weight8, one = x.to(E4M3), weight.to(E4M3), torch.ones((), device=device)
    return lambda: torch._scaled_mm(x8, weight8.mT, one, one, out_dtype=torch.bfloat16)


def measure(
    device: torch.device,
    peaks: Mapping[str, float],
    seconds_of: Callable[[Callable[[], Tensor]], float],
    shapes: Sequence[Shape] = SHAPES,
) -> list[dict[str, Any]]:
    """Time products; those of experts in bf16 alone.

    Args:
        device: that multiplies.
        peaks: FLOP/s of the device, by "bf16" and "fp8".
        seconds_of: returns the time of a call.
        shapes: of the products.

    Returns:
        The fields of `tools.planning.gpus.Measured`.
    """
    found = []
    for dtype, peak in peaks.items():
        for shape in shapes:
            if shape.experts and dtype != BF16:
                continue
            seconds = seconds_of(product(shape, dtype, device))
            flops = 2.0 * shape.m * shape.n * shape.k * max(shape.experts, 1)
            found.append({"dtype": dtype, **shape._asdict(), "share": flops / seconds / peak})
    return found


def peaks_of(device: torch.device, bf16: float) -> dict[str, float]:
    """Return the peaks of a GPU by that of bf16: fp8 has twice that, where there is some."""
    has_fp8 = torch.cuda.get_device_capability(device) >= CAPABILITY
    return {BF16: bf16} | ({FP8: 2 * bf16} if has_fp8 else {})
