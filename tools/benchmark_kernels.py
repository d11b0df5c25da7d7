"""`tools/benchmark.py kernels`: what a layer with experts launches, and keeps for its backward
pass, with and without `--model.compile`; and how long compiling takes.

On a GPU these are its kernels, of a layer of DeepSeek-V3's widths with 16 experts in bf16. On a CPU
they are torch's operations that compute something (views and allocations are none) and the kernels
that torch has compiled, of an eighth of these widths in fp32, without routed experts, which are
other operations there (and never compiled): what arrives at them goes back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from tools.benchmark_gpu import V3, build, hf_config, versions
from torchsft.config import Parallel
from torchsft.models.attention import Documents, choose_implementation, locate_documents
from torchsft.models.language_model import DecoderLayer
from torchsft.parallel import compile as compiling
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World

EXPERTS = 16
# Of V3's sizes, what is not a width.
COUNTS = ("num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor")
# Operations of a CPU that compute nothing.
NONE = """view reshape as_strided slice select transpose permute t expand squeeze unsqueeze
unflatten flatten split split_with_sizes chunk detach alias narrow unbind view_as expand_as mT empty
empty_like empty_strided new_empty new_empty_strided to contiguous resize_ result_type _unsafe_view
is_nonzero lift_fresh item _local_scalar_dense set_ numpy_T matmul linear""".split()
WAYS = ("forward", "backward")


def is_operation(event: Any) -> bool:
    """Whether a CPU's event is an operation of torch or a compiled kernel."""
    name = event.name
    return "cpp_fused" in name or (name.startswith("aten::") and name[6:] not in NONE)


def launches(run: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Return how many kernels a function launches, and what it returns."""
    is_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    with profile(activities=kinds) as profiled:
        result = run()
        if is_gpu:
            torch.cuda.synchronize(device)
    events = profiled.events()
    if is_gpu:
        return sum(event.device_type == DeviceType.CUDA for event in events), result

    def leads_to_others(event: Any) -> bool:
        return any(is_operation(c) or leads_to_others(c) for c in event.cpu_children)

    return sum(is_operation(e) and not leads_to_others(e) for e in events), result


def measure(layer: DecoderLayer, x_SD: Tensor, documents: Documents) -> dict[str, int]:
    """Count what a layer that has run before launches, and what it keeps: bytes of all tensors that
    are neither parameters nor its input.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in [*layer.parameters(), x_SD]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward() -> Tensor:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return layer(x_SD, documents)

    found: dict[str, int] = {}
    found["forward"], y_SD = launches(forward, x_SD.device)
    upstream = torch.ones_like(y_SD)
    found["backward"], _ = launches(lambda: y_SD.backward(upstream), x_SD.device)
    return found | {"kept": sum(kept.values())}


def layer_and_inputs(device: torch.device) -> tuple[DecoderLayer, Tensor, Documents]:
    """Make a layer with experts, and what it is called with."""
    is_gpu = device.type == "cuda"
    tokens, dtype = (4096, torch.bfloat16) if is_gpu else (256, torch.float32)
    part = 1 if is_gpu else 8
    sizes = {k: v if k in COUNTS else v // part for k, v in V3.sizes.items()}
    model = build(hf_config(sizes, EXPERTS, 1)).to(dtype)
    allocate([model], device, offload=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    draw = torch.randn(tokens, model.config.hidden_size, device=device, dtype=dtype)
    positions = torch.arange(tokens, device=device)
    tables = model.model.rotary_emb(positions)
    bounds = torch.tensor([0, tokens], device=device, dtype=torch.int32)
    kind = choose_implementation("auto", device, dtype)
    documents = locate_documents(kind, *tables, bounds, tokens, padding=0)
    layer = model.train().model.layers["1"]
    if not is_gpu:
        layer.mlp.experts.compute = lambda x_RD, *_: x_RD
    return layer, draw.requires_grad_(), documents


def run(json_path: Path | None) -> dict[str, Any]:
    """Measure both, print a table and write it as JSON."""
    torch._inductor.config.cpp.enable_kernel_profile = True
    with World(Parallel(), 0) as world:
        report: dict[str, Any] = versions(world.device)
        layer, *inputs = layer_and_inputs(world.device)
        for name in ("as it is", "--model.compile"):
            if name != "as it is":
                compiling.apply_compile(layer)
            for _ in range(2):
                layer(*inputs).sum().backward()
            found = report[name] = measure(layer, *inputs)
            kept = found["kept"] / len(inputs[0]) / 2**10
            numbers = "  ".join(f"{way} {found[way]:4}" for way in WAYS)
            print(f"{name:16} launches: {numbers}  kept: {kept:.1f} KiB a token", flush=True)
    report["compiling"] = compiling.compiled_message()
    print(report["compiling"])
    if json_path:
        json_path.write_text(json.dumps(report, indent=2))
    return report
