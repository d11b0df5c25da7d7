"""Held-out loss over every row, and how far the routing of held-out tokens has drifted.

Shapes: S tokens of a microbatch on this rank, n those of all ranks that count, L layers that have
experts, E experts, K choices per token.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchsft.data.batch import Batch
from torchsft.data.stream import EvalSet
from torchsft.parallel.pipeline import OneStage, Pipeline
from torchsft.parallel.world import World

# Batches of a set that are in memory; many, so that a pipeline's ranks are busy.
BATCHES_AT_ONCE = 64
LARGEST_EXPONENT = 700.0  # exp of more is infinite in float64
DRIFT_TOKENS = 512  # of the first evaluation row: those whose routing is compared


class Evaluation:
    """A run's evaluation sets, and how the model before the first step routed their first row."""

    def __init__(
        self,
        pipeline: Pipeline | OneStage,
        sets: Mapping[str, EvalSet],
        layer_experts: Mapping[int, int],  # number of experts of every MoE layer of the whole model
        world: World,
    ) -> None:
        self.pipeline, self.sets, self.world = pipeline, sets, world
        self.layer_experts = layer_experts
        self.base_routing: dict[str, Any] | None = None  # saved in checkpoints

    def run(self, message: Callable[[str], None]) -> dict[str, float]:
        """Compute the loss over all sets (see `evaluate_loss`), and the share of choices of experts
        that the model before the first step did not make; `message` prints a line.
        """
        found = evaluate_loss(self.pipeline, self.sets, self.world)
        routing = self.routing() if self.base_routing else None
        if not routing:
            return found
        drift = routing_drift(routing, self.base_routing)
        if drift is None:
            message("no routing drift: --data.eval begins otherwise than at step 0")
        else:
            found["eval_routing_drift"] = drift
        return found

    def routing(self) -> dict[str, Any] | None:
        """Return how the first evaluation row is routed; None where there is none."""
        first = next(iter(self.sets.values()), ())
        if not self.layer_experts or not len(first):
            return None
        return routing_choices(self.pipeline, first.first_row(), self.layer_experts, self.world)


@torch.no_grad()
def evaluate_loss(
    pipeline: Pipeline | OneStage, sets: Mapping[str, EvalSet], world: World
) -> dict[str, float]:
    """Compute the token-weighted mean loss (nats) and perplexity over every row.

    Returns:
        Of all sets together `eval_loss` and `eval_perplexity`; of each of several also
        `eval_loss/NAME` and `eval_perplexity/NAME`. Where MTP layers are trained, likewise
        `eval_mtp_acceptance`: the share of supervised tokens that the first of them drafts as the
        model itself would choose them.
    """
    totals = {f"/{name}": _total(pipeline, batches, world) for name, batches in sets.items()}
    shown = {"": sum(totals.values())}
    if len(totals) > 1:
        shown |= totals
    results = {}
    for suffix, total in shown.items():
        loss_sum, loss_weight, accepted, drafted = total.tolist()
        loss = loss_sum / loss_weight
        results[f"eval_loss{suffix}"] = loss
        results[f"eval_perplexity{suffix}"] = math.exp(min(loss, LARGEST_EXPONENT))
        if drafted:
            results[f"eval_mtp_acceptance{suffix}"] = accepted / drafted
    return results


def _total(pipeline: Pipeline | OneStage, batches: EvalSet, world: World) -> torch.Tensor:
    """Compute the loss of one evaluation set.

    Returns:
        Loss sum, loss weight, accepted drafts and all drafts, over all ranks: float64 [4].
    """
    loss_sum, loss_weight = pipeline.zero.clone(), 0.0
    drafts = pipeline.modules[-1].mtp_drafts
    drafts.zero_()
    numbers = range(len(batches))
    for start in numbers[::BATCHES_AT_ONCE]:
        group = [batches[number] for number in numbers[start : start + BATCHES_AT_ONCE]]
        loss_sum += pipeline.evaluate(group)
        for batch in group:
            loss_weight += batch.loss_weights.double().sum().item()
    if world.dense.get_local_rank("tp") > 0:
        # Each rank of a tensor group has the loss of all of its tokens: its first one counts.
        loss_sum.zero_()
        drafts.zero_()
    if not world.is_reader:
        loss_weight = 0.0
    sums = torch.stack([loss_sum, loss_sum.new_tensor(loss_weight)])
    return world.sum(torch.cat([sums, drafts]))


@torch.no_grad()
def routing_choices(
    pipeline: Pipeline | OneStage, row: Batch, layer_experts: Mapping[int, int], world: World
) -> dict[str, Any]:
    """Note which experts every layer chooses for the first tokens of a row.

    Args:
        pipeline: of the model.
        row: a microbatch; that of data rank 0 counts, the others keep it company.
        layer_experts: number of experts of every MoE layer of the whole model.
        world: the ranks.

    Returns:
        JSON-able, on the main rank: its `tokens`, and `chosen`, a bit for each of [n, L, E].
    """
    layers, tokens = list(layer_experts), pipeline.tokens
    most_experts = max(layer_experts.values())
    shape = min(tokens, DRIFT_TOKENS), len(layers), most_experts
    chosen_nLE = torch.zeros(shape, dtype=torch.bool, device=world.device)
    for model in pipeline.modules:
        place_T = torch.arange(tokens, device=world.device)
        place_S = model.layout.tokens(place_T)
        for name, moe in model.moe_layers().items():
            chosen_nE = chosen_nLE[:, layers.index(int(name))]
            moe.observe = partial(_note, chosen_nE, [place_S])
    pipeline.evaluate([row])
    for model in pipeline.modules:
        for moe in model.moe_layers().values():
            del moe.observe
    counted = row.cu_seqlens[-1] if world.data_rank == 0 else 0  # the rest is padding
    chosen_nLE[counted:] = False
    chosen_nLE = world.sum(chosen_nLE).bool().cpu()
    n = int(chosen_nLE.flatten(1).any(-1).sum())
    bits = np.packbits(chosen_nLE[:n].numpy()).tobytes()
    return {"tokens": row.tokens[:n].tolist(), "chosen": bits.hex()}


def _note(chosen_nE: Tensor, rest: list[Tensor], experts_SK: Tensor) -> None:
    """Mark the experts that some of this rank's tokens have chosen, as far as they count.

    Args:
        chosen_nE: bool; of the first n tokens of the row.
        rest: where these tokens and those behind them lie, in one tensor; only the latter after it.
        experts_SK: what they have chosen.
    """
    place_S, rest[0] = rest[0].tensor_split([len(experts_SK)])
    here_S = place_S < len(chosen_nE)
    tokens_S1, experts_SK = place_S[here_S].unsqueeze(1), experts_SK[here_S]
    chosen_nE[tokens_S1, experts_SK] = True


def routing_drift(now: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Return the share of the choices of `now` that `base` did not make; None if they are of other
    tokens.
    """
    if now["tokens"] != base["tokens"]:
        return None
    # all bits of the choices as one whole number
    chosen, before = int(now["chosen"], 16), int(base["chosen"], 16)
    return (chosen & ~before).bit_count() / chosen.bit_count()
