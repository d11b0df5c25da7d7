"""For `tools/benchmark.py gpu`: the layers of one rank in a large layout, on one GPU, without the
exchange of rows.

A stage's experts receive as many rows as those of one rank of the `ep` axis would, times a forced
imbalance: copies of this rank's own tokens, dealt to its experts in turn. What is measured is so
all that a rank computes, and nothing that it sends.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tools.benchmark_modes import documents
from torchsft.config import Train
from torchsft.models.decoder import local
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import LocalExchange
from torchsft.parallel.apply import parallelize
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World


@dataclass(frozen=True)
class Stage:
    """Layers of a model, of whose experts this rank has some."""

    name: str
    config: dict[str, Any]  # a config.json's object; its first layer is dense
    layers: int  # MoE layers
    local_experts: int
    tokens: int  # of a microbatch
    lengths: list[int]  # of its documents
    train: Train  # how activations are kept


class ForcedExchange(LocalExchange):
    """A MoE layer's `exchange` that sends nothing: local experts get `imbalance` rows for each
    choice of a token, of that token, in turn. See `models.moe.Exchange`.
    """

    def __init__(self, local_experts: int, imbalance: int) -> None:
        super().__init__(local_experts)
        self.imbalance = imbalance

    def __call__(
        self, x_SD: Tensor, weights_SK: Tensor, chosen_SK: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the experts make of the copies, added up, and the shared experts' output."""
        weights_SK = weights_SK.repeat(1, self.imbalance) / self.imbalance
        in_turn_R = torch.arange(weights_SK.numel(), device=x_SD.device) % self.experts
        return super().__call__(x_SD, weights_SK, in_turn_R.view_as(weights_SK), *rest)

    def ends(self, rows: int) -> list[int]:
        """Return where each expert's rows end."""
        counts = [len(range(expert, rows, self.experts)) for expert in range(self.experts)]
        return list(accumulate(counts))


def build_stage(stage: Stage, world: World, imbalance: int, compute: torch.dtype) -> LanguageModel:
    """Make a stage with random weights: fp32 parameters, on one rank."""
    layers = range(1, 1 + stage.layers)
    with torch.device("meta"):
        model = build_model(stage.config, layers=layers, first=False, last=False)
        for moe in model.moe_layers().values():
            for name, parameter in list(moe.experts.named_parameters(recurse=False)):
                part = nn.Parameter(parameter.new_empty(stage.local_experts, *parameter.shape[1:]))
                moe.experts.register_parameter(name, part)
            moe.exchange = ForcedExchange(stage.local_experts, imbalance)
    parallelize([model], world, compute, activations=stage.train)
    allocate([model], world.device, False)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            part = local(tensor)
            part.fill_(1.0) if "norm" in name else part.normal_(std=0.02)
    return model.train()


def flops(stage: Stage, imbalance: int) -> float:
    """Return FLOPs of a forward and a backward pass, recomputation not counted, as
    `ModelConfig.flops` counts them.
    """
    with torch.device("meta"):
        config = build_model(stage.config, layers=[], first=False, last=False).config
    costs = config.layer_costs()
    of_all = 6 * (config.head_cost + sum(costs)) * stage.tokens
    attention = (config.flops(stage.lengths) - of_all) / len(costs)
    sizes = stage.config
    expert = 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"]
    more_rows = stage.tokens * sizes["num_experts_per_tok"] * (imbalance - 1)
    return stage.layers * (6 * (costs[1] * stage.tokens + expert * more_rows) + attention)


def measure_stage(
    stage: Stage,
    world: World,
    imbalance: int,
    repeats: int,
    compute: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Time the passes of one microbatch through a stage, and its memory; or say that it does not
    fit.
    """
    try:
        return _measure(stage, world, imbalance, repeats, compute)
    except torch.OutOfMemoryError as error:
        return {"refused": str(error)}
    finally:
        gc.collect()  # an FSDP model is in reference cycles
        torch.cuda.empty_cache()


def _measure(
    stage: Stage, world: World, imbalance: int, repeats: int, compute: torch.dtype
) -> dict[str, Any]:
    device = world.device
    is_cuda = device.type == "cuda"
    model = build_stage(stage, world, imbalance, compute)
    batch = documents(torch.zeros(stage.tokens, dtype=torch.int64, device=device), stage.lengths)
    where = {name: batch[name] for name in ("positions", "cu_seqlens", "max_seqlen")}
    x_SD, grad_SD = (
        torch.randn(stage.tokens, stage.config["hidden_size"], device=device).to(compute)
        for _ in range(2)
    )
    x_SD.requires_grad_()

    def clock() -> float:
        if is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = {"forward": 0.0, "backward": 0.0}
    for number in range(repeats + 2):
        if number == 2 and is_cuda:  # the first ones allocate and compile
            torch.cuda.reset_peak_memory_stats(device)
        began = clock()
        y_SD = model(x_SD, **where)
        between = clock()
        y_SD.backward(grad_SD)
        ended = clock()
        if number >= 2:
            seconds["forward"] += (between - began) / repeats
            seconds["backward"] += (ended - between) / repeats
    work = flops(stage, imbalance)
    result: dict[str, Any] = {
        "rows": stage.tokens * stage.config["num_experts_per_tok"] * imbalance,
        "tflops": work / sum(seconds.values()) / 1e12,
        "parameters": sum(local(parameter).numel() for parameter in model.parameters()),
    }
    for name, each in seconds.items():
        result[f"{name}_ms_per_layer"] = each * 1e3 / stage.layers
    if is_cuda:
        result["allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return result


def line(result: dict[str, Any]) -> str:
    """Return a stage's numbers in one line."""
    if "refused" in result:
        return result["refused"]
    return (
        f"{result['forward_ms_per_layer']:6.1f} + {result['backward_ms_per_layer']:6.1f} ms a "
        f"layer  {result['tflops']:5.0f} TFLOP/s  allocated {result['allocated_gib']:5.1f} GiB  "
        f"reserved {result['reserved_gib']:5.1f} GiB"
    )
