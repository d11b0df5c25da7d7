"""`tools/benchmark.py savings`: what parts of the memory of a step are saved by, predicted.

A pipeline rank of DeepSeek-V3's widths takes a step on meta tensors (torchsft/planning/memory.py),
with its experts' rows at 1, 2 or 4 times the mean, and each saving switched off in turn:

    all            as it is
    FSDP2 experts  experts that one rank holds are in FSDP2, on a mesh of size 1
    whole rows     an overloaded rank computes all of its rows at once
    all buffers    a receive buffer for each microbatch, for the whole step

Beside the peak stands what the step allocates for gradients from its beginning to its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torchsft.config import Config, Data, Parallel, Train
from torchsft.models import moe
from torchsft.parallel import fsdp
from torchsft.parallel.torch_pipelining import Stage
from torchsft.planning.memory import predict
from torchsft.planning.simulation import GRADIENTS, LiveMemory

# 8 layers of V3 on each of 2 pipeline ranks, 8 experts of each on a rank.
MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
TOKENS = 4096
MICROBATCHES = 8


@contextmanager
def all_buffers() -> Iterator[None]:
    """Let stages keep what torch makes: a receive buffer for each microbatch."""
    names = ("_prepare_forward_infra", "_prepare_backward_infra")
    with patch.object(Stage, "_place", lambda *_, **__: None):
        kept = {name: getattr(Stage.__base__, name) for name in names}
        with patch.multiple(Stage, **kept):
            yield


@contextmanager
def counted(sizes: list[int]) -> Iterator[None]:
    """Add the bytes of each allocation for gradients to `sizes`."""
    add = LiveMemory.add

    def count(memory: LiveMemory, size: int, purpose: str) -> None:
        if purpose == GRADIENTS and size > 0:
            sizes.append(size)
        add(memory, size, purpose)

    with patch.object(LiveMemory, "add", count):
        yield


VARIANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "all": nullcontext,
    "FSDP2 experts": lambda: patch.object(fsdp, "_is_alone", lambda *_: False),
    "whole rows": lambda: patch.object(moe, "MOST", 1000),
    "all buffers": all_buffers,
}
# and rows of the rank's experts, over the mean
RUNS = [
    *(("all", 1), ("all", 2), ("all", 4), ("whole rows", 4)),
    *(("FSDP2 experts", 1), ("all buffers", 1)),
]


def config() -> Config:
    """Return the run: 2 pipeline ranks of 32 data ranks, one row a microbatch."""
    return Config(
        data=Data(seq_len=TOKENS),
        train=Train(global_batch_size=32 * MICROBATCHES, activation_checkpointing="full"),
        parallel=Parallel(pp=2, pp_schedule="1F1B", dp_shard=32, ep=32),
    )


def run(path: Path | None) -> None:
    """Predict and print each variant, and write all to `path`."""
    results = []
    for name, imbalance in RUNS:
        sizes: list[int] = []
        with VARIANTS[name](), counted(sizes):
            memory = predict(config(), MODEL, 64, pp_rank=1, imbalance=imbalance)
        held = {purpose: size / 1e9 for purpose, size in memory.held.items()}
        gradients = {"allocations": len(sizes), "gigabytes": sum(sizes) / 1e9}
        results.append(
            {
                "variant": name,
                "imbalance": imbalance,
                "gigabytes": held,
                "allocated_for_gradients": gradients,
            }
        )
        parts = ", ".join(f"{purpose} {size:.2f}" for purpose, size in held.items())
        print(
            f"{name:14} x {imbalance}: {memory.allocated / 1e9:.2f} GB ({parts}); for gradients "
            f"{len(sizes)} allocations, {sum(sizes) / 1e9:.1f} GB in all",
            flush=True,
        )
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")
