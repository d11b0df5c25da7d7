"""Pipelines of every schedule against the same model on one process; plans against brute force; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.models.oracle import VOCABULARY, packed
from tests.tiny import tiny_config
from torchsft.checkpoint.huggingface import initialise_weights
from torchsft.config import Parallel
from torchsft.data.batch import Batch
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config, initial_value
from torchsft.parallel.apply import parallelize
from torchsft.parallel.pipeline import build_pipeline, plan_stages, reshard_after_forward, split
from torchsft.parallel.world import World

SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
TOKENS, MICROBATCHES = 24, 8
# Documents of each microbatch; the fourth has none.
DOCUMENTS = [[24], [5, 7], [1, 1, 20], [], [10, 3], [2], [11, 12], [6, 6, 6, 6]]
WEIGHT = 17.0


def model_config(**changes: Any) -> DeepseekV3Config:
    hf = tiny_config(vocab_size=VOCABULARY, num_hidden_layers=8, **changes)
    return DeepseekV3Config.from_hf(hf.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]})


def batches(count: int = MICROBATCHES, seed: int = 0) -> list[Batch]:
    return [Batch(**packed(d, TOKENS - sum(d), seed=seed + i)) for i, d in zip(range(count), DOCUMENTS * 2, strict=False)]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


PROMPT = {
    "tokens": torch.arange(13),
    "positions": torch.cat([torch.arange(9), torch.arange(4)]),
    "cu_seqlens": torch.tensor([0, 9, 13], dtype=torch.int32),
    "max_seqlen": 9,
    "logits_at": torch.tensor([8, 12]),
}


def expected(data_size: int = 1) -> dict[str, Any]:
    """Loss, gradients, evaluation and logits of one process."""
    model = DeepseekV3(model_config())
    initialise_weights(model, 0, initial_value)
    result = {}
    rows = [batch for rank in range(data_size) for batch in batches(seed=100 * rank)]
    for batch in rows:
        (model(**batch.model_inputs()) / WEIGHT).backward()
    result["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        result["loss"] = sum(model(**batch.model_inputs()).double() for batch in rows)
        result["eval"] = sum(model(**batch.model_inputs()).double() for batch in batches(11))
        result["logits"] = model(**PROMPT)
    return result


def run_schedules(parallels: list[Parallel]) -> list[dict[str, Any]]:
    """On each rank and for each layout: a step, an evaluation, logits, and a step again."""
    results = []
    with World(parallels[0], 0) as world:
        pp_rank = world.dense.get_local_rank("pp")
        for parallel in parallels:
            config = model_config()
            plan = plan_stages(parallel, config, MICROBATCHES)
            with torch.device("meta"):
                model = DeepseekV3(config, **plan.model_part(pp_rank))
                stages = split(model, plan, pp_rank)
            parallelize(stages, world, torch.float32, reshard_after_forward=reshard_after_forward(parallel))
            pipeline = build_pipeline(
                stages, plan, parallel, world, microbatches=MICROBATCHES, tokens=TOKENS, dtype=torch.float32
            )
            for stage in stages:
                stage.to_empty(device="cpu")
                stage.init_buffers()
            initialise_weights(model, 0, initial_value)
            mine = batches(seed=100 * world.data_rank)
            result: dict[str, Any] = {"ranks": plan.ranks}
            for when in ("first", "again"):
                loss = pipeline.step(mine, WEIGHT)
                result[when] = {"loss": loss, "gradients": {n: full(p.grad) for n, p in model.named_parameters()}}
                for p in model.parameters():
                    p.grad = None
                if when == "first":
                    result["eval"] = pipeline.evaluate(batches(11))
                    result["nothing"] = pipeline.evaluate([])
                    result["logits"] = pipeline.logits(**PROMPT)
            results.append(result)
    return results


def compare(results: list[dict[str, Any]], reference: dict[str, Any], copies: int) -> dict[str, float]:
    """Worst errors."""
    errors = {}
    for when in ("first", "again"):
        loss = sum(r[when]["loss"] for r in results)
        errors[f"{when} loss"] = abs(loss / reference["loss"] - 1).item()
        gradients = {name: g for r in results for name, g in r[when]["gradients"].items()}
        assert gradients.keys() == reference["gradients"].keys()
        worst = {n: ((g - gradients[n]).abs().max() / g.abs().max()).item() for n, g in reference["gradients"].items()}
        errors[f"{when} gradients"] = max(worst.values())
        errors[f"{when} worst"] = max(worst, key=worst.get)
    errors["eval"] = abs(sum(r["eval"] for r in results) / copies / reference["eval"] - 1).item()
    errors["logits"] = max((r["logits"] - reference["logits"]).abs().max().item() for r in results)
    return errors


@pytest.mark.parametrize(("pp", "shard", "ep"), [(2, 1, 1), (4, 1, 1), (2, 2, 2)])
def test_every_schedule_computes_the_step_of_one_process(ranks, pp, shard, ep):
    parallels = [Parallel(pp=pp, dp_shard=shard, ep=ep, pp_schedule=schedule, timeout_seconds=60) for schedule in SCHEDULES]
    reference = expected(shard)
    results = ranks(pp * shard, run_schedules, parallels=parallels)
    for i, schedule in enumerate(SCHEDULES):
        print(schedule, compare([r[i] for r in results], reference, shard))
