"""The longest row at a fixed memory: --train.activation-checkpointing full against stream, for
`tools/benchmark.py rows`.

Two layers of DeepSeek-V3's shape, a sixteenth as wide, with 8 experts of which each token chooses
8, in fp32: one document a row, forward and backward. Memory is what torch's CPU allocator holds at
most above weights and gradients, which are there before. Where both modes hold a row, their
gradients are compared and their times are taken in turns.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.benchmark_step import held_peak
from torchsft.config import Train
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.activation import apply_activation_checkpointing

NARROWER = 16
SIZES = {
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": 7168 // NARROWER,
    "moe_intermediate_size": 2048 // NARROWER,
    "num_attention_heads": 128 // NARROWER,
    "q_lora_rank": 1536 // NARROWER,
    "kv_lora_rank": 512 // NARROWER,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "n_routed_experts": 8,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "intermediate_size": 18432 // NARROWER,
    "max_position_embeddings": 163840,
}
MODES = {
    "full": Train(activation_checkpointing="full"),
    "stream": Train(activation_checkpointing="stream"),
    "stream, 16 pieces": Train(activation_checkpointing="stream", stream_pieces=16),
}
LIMIT = 64 * 2**20  # bytes
STEP = 64  # tokens: how exactly the longest row is found


def model_of(mode: Train) -> LanguageModel:
    """Make the model, the same in every mode, with gradients of zero."""
    torch.manual_seed(0)
    model = build_model(SIZES).train()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    apply_activation_checkpointing(model, mode, torch.device("cpu"))
    return model


def row_pass(model: LanguageModel, tokens: int) -> None:
    """Go forward and backward through a row of one document."""
    ids = torch.arange(tokens) * 7919 % SIZES["vocab_size"]
    loss = model(
        ids,
        positions=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        labels=ids.roll(-1),
        max_seqlen=tokens,
    )
    (loss / tokens).backward()


def peak(model: LanguageModel, tokens: int) -> int:
    """Bytes held at most during a pass."""
    return held_peak(lambda: row_pass(model, tokens))


def longest(model: LanguageModel, limit: int) -> int:
    """Return the longest row, a multiple of STEP, whose pass holds at most `limit` bytes."""
    fits = 0
    beyond = 1
    while peak(model, beyond * STEP) <= limit:
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if peak(model, middle * STEP) <= limit:
            fits = middle
        else:
            beyond = middle
    return fits * STEP


def gradients(mode: Train, tokens: int) -> dict[str, Tensor]:
    """Return the gradients of one row."""
    model = model_of(mode)
    row_pass(model, tokens)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def deviation(mode: Train, tokens: int) -> float:
    """Return how far an element of a gradient is from `full`'s at most, over the largest one of its
    parameter.
    """
    expected, found = gradients(MODES["full"], tokens), gradients(mode, tokens)
    return max(
        ((found[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    )


def seconds_of(models: dict[str, LanguageModel], tokens: int, repeats: int) -> dict[str, float]:
    """Return the median time of a pass in each mode, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            began = time.perf_counter()
            row_pass(model, tokens)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def run(json_path: Path | None, repeats: int) -> dict[str, Any]:
    """Measure, print and write the numbers."""
    models = {name: model_of(mode) for name, mode in MODES.items()}
    rows = {name: longest(model, LIMIT) for name, model in models.items()}
    common = rows["full"]
    seconds = seconds_of(models, common, repeats)
    found: dict[str, Any] = {"limit_bytes": LIMIT, "torch": torch.__version__, "modes": {}}
    print(f"{LIMIT / 2**20:.0f} MiB, {platform.machine()}, torch {torch.__version__}")
    for name, mode in MODES.items():
        numbers = found["modes"][name] = {
            "longest_row": rows[name],
            "seconds": seconds[name],
            "deviation": deviation(mode, common),
        }
        print(
            f"{name:20} longest row {rows[name]:6} ({rows[name] / common:.2f} x)   {common} tokens "
            f"in {seconds[name]:.2f} s ({seconds[name] / seconds['full']:.2f} x)   gradients "
            f"differ by {numbers['deviation']:.1e}",
            flush=True,
        )
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1))
    return found
