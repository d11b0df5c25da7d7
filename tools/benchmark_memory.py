"""`tools/benchmark.py memory`: the memory of a step of presets, predicted without a GPU
(torchsft/planning/memory.py), of the pipeline ranks that hold most, and what it is for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.published import PRESETS, model_config
from torchsft.config import Config, InputError
from torchsft.planning.memory import CONTEXT, FRAGMENTS, Memory, predict
from torchsft.resolution import smallest_number_of_ranks

# Bytes that torch finds on an H100 of 80 GB (`total_memory`: 79.1 GiB).
H100 = 84_900_000_000


def roles(config: Config) -> list[int]:
    """Return the pipeline ranks that may hold most: the first has the embedding, the second most
    microbatches of whole layers, the last the loss.
    """
    pp = config.parallel.pp
    return sorted({0, min(1, pp - 1), pp // 2, pp - 1})


def predict_preset(preset: str, imbalance: float) -> list[Memory]:
    """Return the memory of a preset's `roles`."""
    config = PRESETS[preset]()
    size = smallest_number_of_ranks(config.parallel)
    return [predict(config, model_config(preset), size, rank, imbalance) for rank in roles(config)]


def run(json_path: Path | None, presets: Sequence[str], imbalance: float) -> dict[str, Any]:
    """Predict presets (none: all that are for published models), print a table in GB, and write it
    as JSON.
    """
    names = presets or [name for name in PRESETS if name not in ("debug", "finetune")]
    for name in names:
        if name not in PRESETS or name in ("debug", "finetune"):
            raise InputError(f"{name} is no preset of a published model; those are {list(PRESETS)}")
    print(f"rows that a rank receives: {imbalance} x the mean; reserve: {CONTEXT / 1e9} + ", end="")
    print(f"{FRAGMENTS / 1e9} GB; an H100 has {H100 / 1e9} GB")
    report: dict[str, Any] = {"imbalance": imbalance, "reserve": CONTEXT + FRAGMENTS}
    for name in names:
        report[name] = []
        for memory in predict_preset(name, imbalance):
            held = {purpose: size for purpose, size in memory.held.items() if size}
            report[name].append({"pp_rank": memory.pp_rank, "needed": memory.needed, "held": held})
            parts = "  ".join(f"{key} {size / 1e9:.1f}" for key, size in held.items())
            fits = "fits" if memory.needed <= H100 else "DOES NOT FIT"
            print(f"{name} rank {memory.pp_rank}: {memory.needed / 1e9:.1f} GB {fits}  {parts}")
        if json_path:
            json_path.write_text(json.dumps(report, indent=2) + "\n")
    return report
