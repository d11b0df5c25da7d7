"""Held-out loss over every row."""

import math
from collections.abc import Mapping

import torch

from torchsft.data.stream import EvalSet
from torchsft.parallel.pipeline import OneStage, Pipeline
from torchsft.parallel.world import World

# Batches of a set that are in memory; many, so that a pipeline's ranks are busy.
BATCHES_AT_ONCE = 64
LARGEST_EXPONENT = 700.0  # exp of more is infinite in float64


@torch.no_grad()
def evaluate_loss(
    pipeline: Pipeline | OneStage, sets: Mapping[str, EvalSet], world: World
) -> dict[str, float]:
    """Compute the token-weighted mean loss (nats) and perplexity over every row.

    Returns:
        Of all sets together `eval_loss` and `eval_perplexity`; of each of several also
        `eval_loss/NAME` and `eval_perplexity/NAME`.
    """
    totals = {name: _total(pipeline, batches, world) for name, batches in sets.items()}
    by_suffix = {"": sum(totals.values())}
    if len(totals) > 1:
        by_suffix |= {f"/{name}": total for name, total in totals.items()}
    results = {}
    for suffix, total in by_suffix.items():
        loss_sum, loss_weight = total.tolist()
        loss = loss_sum / loss_weight
        results[f"eval_loss{suffix}"] = loss
        results[f"eval_perplexity{suffix}"] = math.exp(min(loss, LARGEST_EXPONENT))
    return results


def _total(pipeline: Pipeline | OneStage, batches: EvalSet, world: World) -> torch.Tensor:
    """Return loss sum and loss weight of a set over all ranks, float64 [2]."""
    loss_sum, loss_weight = pipeline.zero.clone(), 0.0
    for start in range(0, len(batches), BATCHES_AT_ONCE):
        end = min(start + BATCHES_AT_ONCE, len(batches))
        group = [batches[number] for number in range(start, end)]
        loss_sum += pipeline.evaluate(group)
        for batch in group:
            loss_weight += batch.loss_weights.double().sum().item()
    if world.dense.get_local_rank("tp") > 0:
        # Each rank of a tensor group has the loss of all of its tokens: its first one counts.
        loss_sum.zero_()
    if not world.is_reader:
        loss_weight = 0.0
    return world.sum(torch.stack([loss_sum, loss_sum.new_tensor(loss_weight)]))
