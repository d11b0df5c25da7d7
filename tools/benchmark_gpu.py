"""`tools/benchmark.py gpu`: a training step at real widths on one device, in bf16 and in every mode
of memory and precision (benchmark_modes.py), beside that device's matrix product peak in bf16.

Two models, each with a dense layer and as many MoE layers and experts as fit: DeepSeek-V3's own
widths, and the widths of Qwen3-30B-A3B (2048 wide, 128 experts of 768, top-8) with MLA. The
vocabulary is cut to 32,768 so that memory goes to layers.

Then what one rank of large layouts computes (benchmark_stage.py): a pipeline rank of V3, whose
experts receive 1, 2 and 4 times the mean load, and a layer of moonlight. Last the Triton kernels
beside their plain twins (benchmark_triton.py). First of all matrix products of many shapes
(benchmark_products.py).
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools import benchmark_products, benchmark_triton
from tools.benchmark_modes import FULL, MODES, Mode, Side, documents
from tools.benchmark_stage import Stage, line, measure_stage
from tools.benchmark_triton import Sizes
from torchsft import ops
from torchsft.config import InputError, Parallel, Train
from torchsft.metrics.throughput import peak_tflops
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.gradients import clip_factor, global_norm, scale_gradients
from torchsft.parallel.memory import check_host_memory, host_bytes
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


MOONLIGHT_SIZES = dict(
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_attention_heads=16,
    num_key_value_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    vocab_size=163840,
    routed_scaling_factor=2.446,
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


def stages() -> list[Stage]:
    """Return what a rank of V3 with pp 8 and ep 32 has (8 of 256 experts of 8 layers), and a layer
    of moonlight with 8 of 64; activations as in the presets.
    """
    moonlight = hf_config(MOONLIGHT_SIZES, 64, 1) | {"n_shared_experts": 2}
    v3 = hf_config(V3.sizes, V3.experts, 8)
    sizes = ("v3 stage", v3, 8, 4096), ("moonlight layer", moonlight, 1, 8192)
    return [
        Stage(name, config, layers, 8, tokens, document_lengths(tokens), Train(**FULL))
        for name, config, layers, tokens in sizes
    ]


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
    mode: Mode, config: dict[str, Any], world: World, *, row: int, repeats: int
) -> dict[str, Any]:
    """Time, memory and longest kernels of forward + backward + clip + optimizer in a mode on one
    packed row; in bf16, on a CPU in fp32.
    """
    device = world.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = Side(mode, world, config, compute=dtype)
    lengths = document_lengths(row)
    batch = documents(torch.randint(config["vocab_size"], (row,), device=device), lengths)

    def step() -> None:
        side.passes(batch)
        norm = global_norm(side.model.parameters())
        scale_gradients(side.model.parameters(), clip_factor(norm, 1.0))
        side.update()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(step, device, repeats=repeats, warmup=3)
    flops = side.model.config.flops(lengths)
    result = {
        "parameters": sum(p.numel() for p in side.model.parameters()),
        "bytes_per_parameter": side.bytes_per_parameter(),
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


def measure_mode(mode: Mode, config: dict[str, Any], world: World, repeats: int) -> dict[str, Any]:
    """`measure_step` of a row, or what speaks against that mode on this machine."""
    try:
        if mode.optim.get("offload"):
            check_host_memory({"--optim.offload": host_bytes(build(config), is_pinned=True)})
        return measure_step(mode, config, world, row=ROW, repeats=repeats)
    except (InputError, torch.OutOfMemoryError) as error:
        return {"refused": str(error)}
    finally:
        gc.collect()  # an FSDP model is in reference cycles
        torch.cuda.empty_cache()


def measure_kernels(device: torch.device, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time every Triton kernel and its plain twin, and print both."""
    found = {}
    for name, pair in benchmark_triton.pairs(device, sizes).items():
        ops.use_plain(True)  # a twin that has another kernel in it
        twin = seconds_of(pair.twin, device, repeats, warmup=3)
        ops.use_plain(False)
        kernel = seconds_of(pair.kernel, device, repeats, warmup=3)
        speed = pair.bytes / kernel / 1e12
        found[name] = {"twin_ms": twin * 1e3, "kernel_ms": kernel * 1e3, "tb_per_second": speed}
        print(f"{name:42} {twin * 1e3:8.3f} {kernel * 1e3:8.3f} ms  {speed:5.2f} TB/s", flush=True)
    return found


def summary(result: dict[str, Any], peak: float) -> str:
    """Return a step's numbers in one line; `peak` are the device's TFLOP/s."""
    if "refused" in result:
        return result["refused"]
    return (
        f"{result['tokens_per_second']:7.0f} tokens/s  {result['tflops']:5.0f} TFLOP/s "
        f"({result['tflops'] / peak:.0%} of the peak)  {result['peak_memory_gib']:5.1f} GiB  "
        f"{result['bytes_per_parameter']:5.2f} bytes a parameter"
    )


def write(json_path: Path | None, report: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")


def run(json_path: Path | None, repeats: int = 10) -> dict[str, Any]:
    """Measure all modes of both cases on this machine's GPU, print them, and write them as JSON."""
    if not torch.cuda.is_available():
        raise SystemExit("error: benchmark.py gpu needs an NVIDIA GPU, and this machine has none")
    with World(Parallel(), seed=0) as world:
        peak = matmul_tflops(world.device, 8192)
        report: dict[str, Any] = versions(world.device) | {
            "matmul_tflops": peak,
            "data_sheet_tflops": peak_tflops(world.device),
        }
        if data_sheet := report["data_sheet_tflops"]:
            peaks = benchmark_products.peaks_of(world.device, data_sheet * 1e12)
            timed = partial(seconds_of, device=world.device, repeats=repeats, warmup=3)
            report["products"] = benchmark_products.measure(world.device, peaks, timed)
            write(json_path, report)
        memory = torch.cuda.mem_get_info(world.device)[1] * 0.94
        for case in (V3, QWEN3):
            config = hf_config(case.sizes, *largest_that_fits(case, memory))
            for name, mode in MODES.items():
                report[f"{case.name} {name}"] = result = measure_mode(mode, config, world, repeats)
                print(f"{case.name} {name:47} {summary(result, peak)}", flush=True)
                write(json_path, report)
        for stage in stages():
            for imbalance in (1, 2, 4):
                name = f"{stage.name} {imbalance} x"
                report[name] = result = measure_stage(stage, world, imbalance, repeats)
                print(f"{name:20} {line(result)}", flush=True)
                write(json_path, report)
        report["kernels"] = measure_kernels(world.device, Sizes(), repeats)
        write(json_path, report)
    print(f"plain bf16 matrix product: {peak:.0f} TFLOP/s")
    return report
