"""`tools/benchmark.py memory`: the memory of a step of presets, predicted without a GPU
(torchsft/planning/memory.py), of the pipeline ranks that hold most, and what it is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.published import PRESETS, model_config
from torchsft.config import Config, InputError
from torchsft.models.families import build_model, read_model_config
from torchsft.parallel.stages import plan_stages
from torchsft.planning.memory import CONTEXT, FRAGMENTS, Memory, predict
from torchsft.resolution import smallest_number_of_ranks

# Bytes that torch finds on an H100 of 80 GB (`total_memory`: 79.1 GiB).
H100 = 84_900_000_000


def fullest_rank(config: Config, found: Mapping[str, Any]) -> int:
    """Return the pipeline rank with most parameters; of several the first one, which has most
    microbatches in flight.
    """
    pp = config.parallel.pp
    plan = plan_stages(config.parallel, read_model_config(found), 2 * pp)
    with torch.device("meta"):
        parts = [build_model(found, **plan.model_part(rank)) for rank in range(pp)]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    return counts.index(max(counts))


def predict_preset(preset: str, imbalance: float, *, ends: bool = True) -> list[Memory]:
    """Return the memory of a preset's fullest pipeline rank, and of the two at the ends, which have
    the embedding and the loss.
    """
    config, found = PRESETS[preset](), model_config(preset)
    size = smallest_number_of_ranks(config.parallel)
    ranks = {fullest_rank(config, found)} | ({0, config.parallel.pp - 1} if ends else set())
    return [predict(config, found, size, rank, imbalance) for rank in sorted(ranks)]


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
