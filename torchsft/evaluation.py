"""Held-out loss over every row."""

import math
from collections.abc import Mapping

import torch

from torchsft.data.stream import EvalSet
from torchsft.parallel.pipeline import OneStage, Pipeline
from torchsft.parallel.world import World

BATCHES_AT_ONCE = 64  # of a set that are in memory; many, so that a pipeline's ranks are busy


@torch.no_grad()
def evaluate_loss(
    pipeline: Pipeline | OneStage, sets: Mapping[str, EvalSet], world: World
) -> dict[str, float]:
    """Token-weighted mean loss (nats) and perplexity over every row of all sets together, and of
    each of several: `eval_loss`, `eval_perplexity`, and for several sets `eval_loss/NAME`,
    `eval_perplexity/NAME`.
    """
    totals = {}
    for name, batches in sets.items():
        loss_sum, read = 0.0, 0.0
        for start in range(0, len(batches), BATCHES_AT_ONCE):
            group = [batches[i] for i in range(start, min(start + BATCHES_AT_ONCE, len(batches)))]
            loss_sum = loss_sum + pipeline.evaluate(group)
            read += sum(batch.loss_weights.double().sum().item() for batch in group)
        # its first rank has told the loss of all of the group's tokens
        if world.dense.get_local_rank("tp") > 0:
            loss_sum = torch.zeros_like(loss_sum)
        totals[name] = world.sum(
            torch.stack([loss_sum, loss_sum.new_tensor(read if world.is_reader else 0.0)])
        )
    found = {"": sum(totals.values())} | (
        {f"/{name}": total for name, total in totals.items()} if len(totals) > 1 else {}
    )
    results = {}
    for suffix, total in found.items():
        loss_sum, weight = total.tolist()
        results[f"eval_loss{suffix}"] = loss_sum / weight
        results[f"eval_perplexity{suffix}"] = math.exp(min(loss_sum / weight, 700.0))
    return results
