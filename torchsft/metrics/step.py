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


def count_global_batch(
    microbatches: Sequence[Batch], flops: Callable[[list[int]], float], world: World
) -> GlobalBatch:
    """Count the rows of all ranks. One collective.

    Args:
        microbatches: of this rank.
        flops: of documents of these lengths.
        world: of ranks that share rows, one counts them.
    """
    sums = [0.0, 0.0, 0.0, 0.0]
    if world.is_reader:
        lengths = [batch.cu_seqlens.diff().tolist() for batch in microbatches]
        sums = [
            float(sum(batch.loss_weights.double().sum() for batch in microbatches)),
            float(sum((batch.loss_weights != 0).sum() for batch in microbatches)),
            float(sum(sum(documents) for documents in lengths)),
            sum(flops(documents) for documents in lengths),
        ]
    return GlobalBatch(*world.sum(sums).tolist())


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


@dataclass(frozen=True)
class StepResults:
    """What a step's passes found, over all ranks; the same on every rank."""

    loss_sum: float  # of weighted token losses
    mtp_loss: float  # likewise, of MTP layers
    smoothed_loss: float  # likewise, of the model with --train.label-smoothing
    squares: float  # likewise, of the squares of --train.z-loss
    balance_loss: float  # summed over layers and documents' tokens, not yet scaled
    z_loss: float  # likewise
    expert_load: Mapping[int, Tensor]  # layer -> tokens of each of its experts, float64
    signalled: bool  # a rank has been told to end
    save_failed: bool  # a rank knows of a checkpoint that failed


def reduce_results(
    loss_sum: Tensor,
    last: LanguageModel,
    moe_layers: Mapping[str, MoE],
    layer_experts: Mapping[int, int],
    *,
    signalled: bool,
    save_failed: bool,
    world: World,
) -> StepResults:
    """Sum a step's results over all ranks; the counters of MoE and MTP layers start anew.

    One collective, that the host waits for. Every rank has the same places for all layers, and
    fills in those of its own.

    Args:
        loss_sum: float64 scalar; all ranks of a tensor group have that of all of its tokens.
        last: the module of this rank's last stage, which has further sums of losses.
        moe_layers: this rank's, by number in the whole model.
        layer_experts: number of experts of every MoE layer of the whole model.
        signalled: whether this rank has been told to end.
        save_failed: whether this rank knows of a checkpoint that failed.
        world: the ranks.
    """
    shape = (len(layer_experts), 2 + max(layer_experts.values(), default=0))
    counted = torch.zeros(shape, dtype=torch.float64, device=world.device)
    rows = {layer: row for row, layer in enumerate(layer_experts)}
    for name, moe in moe_layers.items():
        row = counted[rows[int(name)]]
        row[0], row[1] = moe.balance_loss, moe.z_loss
        row[2 : 2 + moe.expert_load.numel()] = moe.expert_load
        moe.init_buffers()
    further = torch.cat([last.mtp_loss.unsqueeze(0), last.objective_sums])
    losses = torch.cat([loss_sum.unsqueeze(0), further.double()])
    if world.dense.get_local_rank("tp") > 0:
        losses.zero_()
    last.mtp_loss.zero_()
    last.objective_sums.zero_()
    flags = counted.new_tensor([signalled, save_failed])
    summed = world.sum(torch.cat([losses, flags, counted.flatten()])).cpu()
    *losses_of_tokens, any_signalled, any_failed = summed[:6].tolist()
    of_layers = summed[6:].view(shape)
    balance_loss, z_loss = of_layers[:, :2].sum(0).tolist()
    expert_load = {
        layer: of_layers[row, 2 : 2 + experts]
        for row, (layer, experts) in enumerate(layer_experts.items())
    }
    return StepResults(
        *losses_of_tokens,
        balance_loss,
        z_loss,
        expert_load,
        any_signalled > 0,
        any_failed > 0,
    )


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
