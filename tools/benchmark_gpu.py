"""`tools/benchmark.py gpu`: a training step in bf16 and in block-wise fp8 at real widths on one
device, beside that device's matrix product peak in bf16.

Two models, each with a dense layer and as many MoE layers and experts as fit: DeepSeek-V3's own
widths, and the widths of Qwen3-30B-A3B (2048 wide, 128 experts of 768, top-8) with MLA. The
vocabulary is cut to 32,768 so that memory goes to layers.
"""

from __future__ import annotations

import gc
import itertools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchsft.config import Optim, Parallel, Precision
from torchsft.metrics.throughput import peak_tflops
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.optim.adamw import build_optimizer
from torchsft.parallel.apply import compute_dtype, parallelize
from torchsft.parallel.blockwise import CAPABILITY
from torchsft.parallel.gradients import clip_factor, global_norm, scale_gradients
from torchsft.parallel.world import World

# fp32 master, gradient and two moments (16), the bf16 copy and bf16 gradient of the layer in work,
# allocator slack.
BYTES_PER_PARAMETER = 19
ACTIVATION_BYTES = 10e9
ROW = 4096


@dataclass(frozen=True)
class Case:
    """A model's sizes in config.json's words, without the number of layers and experts."""

    name: str
    sizes: dict[str, Any]
    experts: int
    """Experts of a layer in the real model."""
    layers: int
    """Layers in the real model."""


V3 = Case(
    "deepseek-v3-widths",
    dict(
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        vocab_size=32768,
        routed_scaling_factor=2.5,
    ),
    experts=256,
    layers=61,
)
QWEN3 = Case(
    "qwen3-30b-a3b-widths",
    dict(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=32,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts_per_tok=8,
        n_group=1,
        topk_group=1,
        vocab_size=32768,
        routed_scaling_factor=1.0,
    ),
    experts=128,
    layers=48,
)


def hf_config(sizes: dict[str, Any], experts: int, moe_layers: int) -> dict[str, Any]:
    """config.json of a DeepSeek-V3 with 1 dense layer and `moe_layers` MoE layers."""
    return sizes | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 1 + moe_layers,
        "first_k_dense_replace": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "max_position_embeddings": ROW,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def build(config: dict[str, Any], **options: Any) -> LanguageModel:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return build_model(config, **options)


def largest_that_fits(case: Case, memory: float) -> tuple[int, int]:
    """(experts, MoE layers) of the largest training step within `memory` bytes: experts first, then
    layers.
    """

    def fits(experts: int, layers: int) -> bool:
        parameters = sum(
            p.numel() for p in build(hf_config(case.sizes, experts, layers)).parameters()
        )
        return parameters * BYTES_PER_PARAMETER + ACTIVATION_BYTES <= memory

    least = max(case.sizes["n_group"] * 2, 2 * case.sizes["num_experts_per_tok"])
    experts = max((e for e in range(least, case.experts + 1, 8) if fits(e, 1)), default=least)
    layers = (
        max((n for n in range(1, case.layers) if fits(experts, n)), default=1)
        if experts == case.experts
        else 1
    )
    return experts, layers


def seconds_of(
    function: Callable[[], object], device: torch.device, repeats: int, warmup: int
) -> float:
    """Mean wall time of a call, synchronised at both ends."""
    for _ in range(warmup):
        function()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_tflops(device: torch.device, size: int) -> float:
    """TFLOP/s of plain bf16 matrix products of size x size, the mark that a step is measured
    against.
    """
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats=20, warmup=5) / 1e12


def document_lengths(row: int) -> list[int]:
    """Documents of a packed row, long and short: a half, a quarter, ... and the rest."""
    lengths = [row // 2, row // 4, row // 8]
    return [*lengths, row - sum(lengths)]


def measure_step(
    config: dict[str, Any], world: World, *, row: int, repeats: int, precision: Precision
) -> dict[str, Any]:
    """Time, memory and longest kernels of forward + backward + clip + AdamW on one packed row."""
    device = world.device
    model = build(config)
    compute = compute_dtype(precision.compute, device)
    parallelize([model], world, compute, precision=precision)
    model.to_empty(device=device)
    model.init_buffers()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local.fill_(1.0) if "norm" in name else local.normal_(std=0.02)
    optimizer = build_optimizer(model, Optim(lr=1e-5))
    lengths = document_lengths(row)
    tokens = torch.randint(config["vocab_size"], (row,), device=device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)

    def step() -> None:
        loss = model(
            tokens,
            positions=positions,
            cu_seqlens=cu_seqlens,
            labels=tokens,
            max_seqlen=max(lengths),
        )
        (loss / row).backward()
        norm = global_norm(model.parameters())
        scale_gradients(model.parameters(), clip_factor(norm, 1.0))
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(step, device, repeats=repeats, warmup=3)
    flops = model.config.flops(lengths)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "experts": config["n_routed_experts"],
        "moe_layers": config["num_hidden_layers"] - 1,
        "row": row,
        "documents": lengths,
        "step_seconds": seconds,
        "tokens_per_second": row / seconds,
        "tflops": flops / seconds / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == "cuda"
        else None,
        "longest_kernels": longest_kernels(step, device),
    }
    return result


def longest_kernels(
    step: Callable[[], None], device: torch.device, count: int = 10
) -> list[dict[str, Any]]:
    """Return the operations of one step that take most of the device's time, with their share."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [
        torch.profiler.ProfilerActivity.CUDA
    ] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize(device)

    def microseconds(event: Any) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=microseconds, reverse=True)
    total = sum(map(microseconds, events)) or 1.0
    return [
        {
            "kernel": e.key[:120],
            "ms": microseconds(e) / 1e3,
            "share": microseconds(e) / total,
            "calls": e.count,
        }
        for e in events[:count]
    ]


def versions(device: torch.device) -> dict[str, Any]:
    """Machine and versions that the numbers belong to."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def run(json_path: Path | None, repeats: int = 10) -> dict[str, Any]:
    """Measure both cases on this machine's GPU, print them, and write them as JSON."""
    if not torch.cuda.is_available():
        raise SystemExit("error: benchmark.py gpu needs an NVIDIA GPU, and this machine has none")
    with World(Parallel(), seed=0) as world:
        peak = matmul_tflops(world.device, 8192)
        report: dict[str, Any] = versions(world.device) | {
            "matmul_tflops": peak,
            "data_sheet_tflops": peak_tflops(world.device),
        }
        memory = torch.cuda.mem_get_info(world.device)[1] * 0.94
        has_fp8 = torch.cuda.get_device_capability(world.device) >= CAPABILITY
        computes = ("bf16", "blockwise") if has_fp8 else ("bf16",)
        for case, compute in itertools.product((V3, QWEN3), computes):
            experts, layers = largest_that_fits(case, memory)
            config = hf_config(case.sizes, experts, layers)
            precision = Precision(compute=compute)
            result = measure_step(config, world, row=ROW, repeats=repeats, precision=precision)
            result["share_of_matmul_peak"] = result["tflops"] / peak
            report[f"{case.name} {compute}"] = result
            gc.collect()  # an FSDP model is in reference cycles
            torch.cuda.empty_cache()
            print(f"{case.name} {compute}: {json.dumps(result, indent=2)}", flush=True)
            if json_path:
                json_path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"plain bf16 matrix product: {peak:.0f} TFLOP/s")
    return report
