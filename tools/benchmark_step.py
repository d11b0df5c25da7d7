"""`tools/benchmark.py step`: one training step of a small DeepSeek-V3 against a plain transformers
loop.

Both sides start from the same weights, see the same batches (rows of one document each, so that
both compute the same loss, which is asserted), run in fp32 in this one process and take turns. The
plain side is what one would write: `DeepseekV3ForCausalLM` with its default attention (sdpa) and
experts, `loss.backward()`, `torch.optim.AdamW`. Ours is the model and the optimizer that the
trainer uses. They do so twice: in a process that gives freed memory back to the system, as glibc
does, and in one that keeps it (`launch.keep_freed_memory`), as recipes do on a CPU. Then every mode
of memory and precision, beside the plain one (benchmark_modes.py), with memory kept.

The share of the peak is the FLOPs of matrix products and attention, the same for both sides
(`ModelConfig.flops`), over the step's time and over what a large fp32 matrix product reaches in the
same run. Beside it stands the share that the step would have if everything but matrix products and
attention took no time: what these reach themselves, and so the most that is left to gain around
them.

Memory is what torch's CPU allocator holds at most during a step above what it held before it, so
above weights and optimizer state; gradients and activations count, scratch space of BLAS libraries
outside the allocator does not.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tools import benchmark_modes
from torchsft.config import Parallel
from torchsft.launch import keep_freed_memory
from torchsft.parallel.world import World

ROWS, ROW = 4, 1024
PEAK_SIZE = 4096  # of the matrices whose product shows what the machine can do
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 4096,
}
LEARNING_RATE = benchmark_modes.LEARNING_RATE

# One side: `compute(tokens)` runs forward and backward and returns the mean loss; `update()` steps
# the optimizer.
Side = tuple[Callable[[Tensor], Tensor], Callable[[], None]]


def transformers_side() -> tuple[Side, dict[str, Tensor], dict[str, Any]]:
    """Return the plain loop, its weights and its config."""
    from transformers import DeepseekV3Config as HfConfig
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = HfConfig(**SMALL, pad_token_id=None, attn_implementation="sdpa")
    model = DeepseekV3ForCausalLM(config).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def compute(tokens: Tensor) -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return (
        (compute, update),
        weights,
        config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]},
    )


def held_peak(function: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held during the call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds_of_products(function: Callable[[], object]) -> float:
    """Return how long matrix products and attention take during the call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    # mm, bmm, addmm_ ... and attention's forward and backward kernels
    computes = re.compile(r"aten::(\w*mm_?|_\w*attention\w*)")
    rows = profiler.key_averages()
    return sum(row.self_cpu_time_total for row in rows if computes.fullmatch(row.key)) / 1e6


def time_table(function: Callable[[], object], rows: int = 25) -> str:
    """Return where the time of a call goes, by operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60
    )


def run(json_path: Path | None, repeats: int, threads: int, show_profile: bool) -> dict[str, Any]:
    """Measure both sides in turns, then every mode; print the numbers and write them as JSON."""
    torch.set_num_threads(threads)
    with World(Parallel(), 0) as world:
        return _run(world, json_path, repeats, threads, show_profile)


def matmul_peak(size: int) -> float:
    """FLOPs a second of an fp32 matrix product of `size` x `size`: the best of 5."""
    left, right = torch.randn(2, size, size)
    seconds = []
    for _ in range(6):  # the first one is not used to anything
        began = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def compare(sides: Mapping[str, Side], batches: Tensor, flops: float) -> dict[str, Any]:
    """Let both sides train on the same batches in turns; print and return their numbers.

    Args:
        sides: by name, transformers first.
        batches: tokens, [steps, ROWS, ROW]; of the first two steps no time is taken, and the last
            one is taken once more under a profiler.
        flops: of a step.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}
    products: dict[str, float] = {}
    for index, tokens in enumerate(batches):
        losses = {}
        for name in sides:

            def step(
                name: str = name, tokens: Tensor = tokens, losses: dict[str, Tensor] = losses
            ) -> tuple[float, float]:
                compute, update = sides[name]
                began = time.perf_counter()
                losses[name] = compute(tokens)
                middle = time.perf_counter()
                update()
                return middle - began, time.perf_counter() - middle

            if index == 0:  # creates the optimizer state
                step()
            elif index == 1:
                peaks[name] = held_peak(step)
            else:
                seconds[name].append(step())
            if index == len(batches) - 1:
                products[name] = seconds_of_products(step)
        # The same loss, while both learn from the same batches; fp32 sums differ in order.
        torch.testing.assert_close(losses["torchsft"], losses["transformers"], rtol=1e-4, atol=0)

    peak_flops = matmul_peak(PEAK_SIZE)
    report: dict[str, Any] = {"peak_gflops": peak_flops / 1e9}
    for name in sides:
        compute, update = map(statistics.median, zip(*seconds[name], strict=True))
        numbers = report[name] = {
            "tokens_per_second": ROWS * ROW / (compute + update),
            "forward_backward_seconds": compute,
            "optimizer_seconds": update,
            "share_of_peak": flops / (compute + update) / peak_flops,
            "share_of_products_alone": flops / products[name] / peak_flops,
            "peak_bytes": peaks[name],
        }
        print(
            f"{name:13} {numbers['tokens_per_second']:7.0f} tokens/s  (forward + backward "
            f"{compute:.2f} s, optimizer {update:.2f} s)  {numbers['share_of_peak']:.2f} of "
            f"{peak_flops / 1e9:.0f} GFLOP/s, products and attention alone "
            f"{numbers['share_of_products_alone']:.2f}  {peaks[name] / 2**20:7.0f} MiB above "
            "weights and optimizer state"
        )
    found, theirs = report["torchsft"], report["transformers"]
    report["speed_ratio"] = found["tokens_per_second"] / theirs["tokens_per_second"]
    report["memory_ratio"] = found["peak_bytes"] / theirs["peak_bytes"]
    print(
        f"torchsft / transformers: {report['speed_ratio']:.2f} x the tokens/s, "
        f"{report['memory_ratio']:.2f} x the memory"
    )
    return report


def _run(
    world: World, json_path: Path | None, repeats: int, threads: int, show_profile: bool
) -> dict[str, Any]:
    batches = torch.randint(
        0, SMALL["vocab_size"], (repeats + 2, ROWS, ROW), generator=torch.Generator().manual_seed(1)
    )

    def both() -> tuple[dict[str, Side], dict[str, Tensor], dict[str, Any], float]:
        """Return sides that have not trained, their weights, config and FLOPs of a step: the longer
        they learn, the further their losses are from each other.
        """
        plain, weights, config = transformers_side()
        ours = benchmark_modes.Side(benchmark_modes.MODES["plain"], world, config, weights)
        sides = {"transformers": plain, "torchsft": (ours.compute, ours.update)}
        return sides, weights, config, ours.model.config.flops([ROW] * ROWS)

    sides, weights, config, flops = both()
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": threads,
        "tokens": ROWS * ROW,
        "config": SMALL,
    }
    print("freed memory goes back to the system:")
    report["given_back"] = compare(sides, batches, flops)
    if keep_freed_memory():
        print("freed memory is kept:")
        sides, *_ = both()
        report["kept"] = compare(sides, batches, flops)
    else:
        print("freed memory cannot be kept here: another C library than glibc, or MALLOC_ is set")
    report["modes"] = benchmark_modes.measure(world, weights, config, batches, held_peak)
    if show_profile:
        for name, (compute, _) in sides.items():
            print(
                f"\n{name}: forward + "
                f"backward\n{time_table(lambda compute=compute: compute(batches[0]))}"
            )
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    return report
