"""What a training step counts: before its passes over the global batch, and behind them over all
ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchsft.config import Config
from torchsft.data.batch import Batch
from torchsft.models.language_model import LanguageModel
from torchsft.models.loss import Objective
from torchsft.models.moe import MoE
from torchsft.parallel.world import World

SMALLEST_WEIGHT = 1e-30  # in place of 0 as a divisor, where nothing is supervised


@dataclass(frozen=True)
class GlobalBatch:
    """Sums over all rows of a step, the same on every rank."""

    loss_weight: float  # of all supervised tokens: what every loss sum is divided by
    supervised_tokens: float
    tokens: float  # padding not counted
    flops: float  # of the model's forward and backward pass, recomputation not counted

    @property
    def divisor(self) -> float:
        """The loss weight, or where there is none a number that can be divided by."""
        return max(self.loss_weight, SMALLEST_WEIGHT)


def count_rows(microbatches: Sequence[Batch], flops: Callable[[list[int]], float]) -> list[float]:
    """Return the numbers of a `GlobalBatch`, of these microbatches alone; beside training, by the
    threads that make them.

    Args:
        microbatches: on the host.
        flops: of documents of these lengths.
    """
    lengths = [batch.cu_seqlens.diff().tolist() for batch in microbatches]
    return [
        float(sum(batch.loss_weights.double().sum() for batch in microbatches)),
        float(sum((batch.loss_weights != 0).sum() for batch in microbatches)),
        float(sum(sum(documents) for documents in lengths)),
        sum(flops(documents) for documents in lengths),
    ]


def set_loss_scales(
    modules: Sequence[LanguageModel], config: Config, batch: GlobalBatch, moe_layers: int
) -> None:
    """Say what the losses besides the token loss, which add their gradients by themselves, are
    multiplied with: those of routing are means over tokens, that of the z-loss over the MoE layers
    of the whole model too; that of MTP layers is one over these, with the token loss's divisor.
    """
    router, tokens = config.router, max(batch.tokens, 1)
    for module in modules:
        for moe in module.moe_layers().values():
            moe.balance_scale = router.aux_loss / tokens
            moe.z_scale = router.z_loss / (tokens * moe_layers)
        mtp_layers = max(len(module.mtp_layers()), 1)
        module.mtp_scale = config.model.mtp_weight / (mtp_layers * batch.divisor)
        module.objective = Objective(config.train.label_smoothing, config.train.z_loss)


LOSSES = 4  # that are summed besides those of routing


@dataclass(frozen=True)
class StepResults:
    """What a step's passes found, over all ranks; the same on every rank."""

    norm: float  # of the gradients before clipping
    loss_sum: float  # of weighted token losses
    mtp_loss: float  # likewise, of MTP layers
    smoothed_loss: float  # likewise, of the model with --train.label-smoothing
    squares: float  # likewise, of the squares of --train.z-loss
    balance_loss: float  # summed over layers and documents' tokens, not yet scaled
    z_loss: float  # likewise
    expert_load: Mapping[int, Tensor]  # layer -> tokens of each of its experts, float64

    @classmethod
    def of(cls, norm: Tensor, sums: Tensor, layer_experts: Mapping[int, int]) -> "StepResults":
        """Read what `sum_results` has summed, on the host."""
        of_routing = of_layers(sums, layer_experts)[:, :2].sum(0)
        expert_load = expert_loads(sums, layer_experts)
        return cls(norm.item(), *sums[:LOSSES].tolist(), *of_routing.tolist(), expert_load)


def sum_results(
    loss_sum: Tensor,
    last: LanguageModel,
    moe_layers: Mapping[str, MoE],
    layer_experts: Mapping[int, int],
    world: World,
) -> Tensor:
    """Sum a step's results over all ranks, on their devices; the counters of MoE and MTP layers
    start anew.

    One collective. Every rank has the same places for all layers, and fills in those of its own.

    Args:
        loss_sum: float64 scalar; all ranks of a tensor group have that of all of its tokens.
        last: the module of this rank's last stage, which has further sums of losses.
        moe_layers: this rank's, by number in the whole model.
        layer_experts: number of experts of every MoE layer of the whole model.
        world: the ranks.

    Returns:
        float64, the losses and `of_layers`, flat.
    """
    further = torch.cat([last.mtp_loss.unsqueeze(0), last.objective_sums])
    losses = torch.cat([loss_sum.unsqueeze(0), further.double()])
    if world.dense.get_local_rank("tp") > 0:
        losses.zero_()
    last.mtp_loss.zero_()
    last.objective_sums.zero_()
    shape = _shape(layer_experts)
    counted = losses.new_zeros(shape)
    if moe_layers:
        rows = {layer: row for row, layer in enumerate(layer_experts)}
        places = [counted[rows[int(name)]] for name in moe_layers]
        loads, *both = zip(*(moe.counters for moe in moe_layers.values()), strict=True)
        ends = [2 + len(load_E) for load_E in loads]
        to_loads = [row[2:end] for row, end in zip(places, ends, strict=True)]
        torch._foreach_copy_(to_loads, loads)
        for number, of_one in enumerate(both):
            torch._foreach_copy_([row[number] for row in places], of_one)
        for counters in (loads, *both):
            torch._foreach_zero_(counters)
    return world.sum(torch.cat([losses, counted.flatten()]))


def _shape(layer_experts: Mapping[int, int]) -> tuple[int, int]:
    return len(layer_experts), 2 + max(layer_experts.values(), default=0)


def of_layers(sums: Tensor, layer_experts: Mapping[int, int]) -> Tensor:
    """Return a row for each MoE layer: balance loss, z-loss, and the load of its experts."""
    return sums[LOSSES:].view(_shape(layer_experts))


def expert_loads(sums: Tensor, layer_experts: Mapping[int, int]) -> dict[int, Tensor]:
    """Return how many tokens each expert got, by layer; see `sum_results`."""
    rows = zip(layer_experts.items(), of_layers(sums, layer_experts), strict=True)
    return {layer: row[2 : 2 + experts] for (layer, experts), row in rows}


def load_scalars(expert_load: Mapping[int, Tensor]) -> dict[str, float]:
    """Return by TensorBoard tag how evenly tokens were routed: of each layer the busiest expert
    over the mean, of all layers the share of experts that got none.
    """
    scalars = {
        f"expert_load/layer_{layer}_max_over_mean": (
            load_E.max() / load_E.mean().clamp(min=1 / len(load_E))
        ).item()
        for layer, load_E in expert_load.items()
    }
    if expert_load:
        unused = torch.cat([*expert_load.values()]) == 0
        scalars["expert_load/unused_share"] = unused.double().mean().item()
    return scalars


def further_losses(
    results: StepResults, config: Config, batch: GlobalBatch, mtp_layers: int
) -> dict[str, float]:
    """Return the losses besides the token loss: the smoothed token loss, of logits and routing as
    they are minimised, of MTP layers their mean.
    """
    losses, tokens, train = {}, max(batch.tokens, 1), config.train
    if train.label_smoothing:
        losses["smoothed_loss"] = results.smoothed_loss / batch.divisor
    if train.z_loss:
        losses["logit_z_loss"] = train.z_loss * results.squares / batch.divisor
    if config.router.aux_loss:
        losses["aux_loss"] = config.router.aux_loss * results.balance_loss / tokens
    if config.router.z_loss:
        mean = results.z_loss / (tokens * len(results.expert_load))
        losses["z_loss"] = config.router.z_loss * mean
    if mtp_layers:
        losses["mtp_loss"] = results.mtp_loss / (mtp_layers * batch.divisor)
    return losses
