"""Mixture of experts with DeepSeek-V3's router: sigmoid scores, a selection-only correction bias,
group-limited top-k; and the sequence-wise balance loss.

Shape suffixes: S tokens on this rank, D width, E experts, G expert groups, K choices per token, R =
S * K routed rows, N documents.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchsft.config import InputError
from torchsft.models.attention import Packing
from torchsft.models.decoder import Float32Buffers, SwigluMLP, local
from torchsft.ops.permute import combine, permute
from torchsft.ops.swiglu import grouped_swiglu, grouped_swiglu_reference

# exchange(x_RD, counts_E, experts, meanwhile) -> (y_RD, meanwhile()), rows sorted by global expert;
# `meanwhile` may be computed while rows travel.
Exchange = Callable[[Tensor, Tensor, "Experts", Callable[[], Tensor]], tuple[Tensor, Tensor]]


class Router(Float32Buffers):
    """Chooses K (`top_k`) of E experts for every token; everything here is fp32 whatever the model
    computes in.

    Experts are split into G groups of neighbours, and those of `top_groups` groups may be chosen.
    `normalise` divides a token's K weights by their sum; `scale` is the factor of the weights after
    that.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        top_k: int,
        groups: int,
        top_groups: int,
        normalise: bool,
        scale: float,
    ) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups = top_k, groups, top_groups
        self.normalise, self.scale = normalise, scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Routing weights (fp32 [S, K]), the chosen experts (int64 [S, K]) and all scores (fp32 [S,
        E]).

        Weights are the sigmoid scores; the correction bias takes part in the choice alone. Groups
        compete by the sum of their two best biased scores, and experts of the other groups are out
        (-inf: a fill of 0, as in DeepSeek's first public code, lets them win over negative biased
        scores; transformers 5 uses -inf too).
        """
        scores_SE = F.linear(x_SD.float(), local(self.weight).float()).sigmoid()
        choice_SE = scores_SE.detach() + self.e_score_correction_bias
        if self.top_groups < self.groups:
            choice_SGe = choice_SE.unflatten(1, (self.groups, -1))
            group_scores_SG = choice_SGe.topk(2, dim=-1).values.sum(-1)
            best_groups = group_scores_SG.topk(self.top_groups, dim=-1, sorted=False).indices
            out_SG = torch.ones_like(group_scores_SG, dtype=torch.bool).scatter_(
                1, best_groups, False
            )
            choice_SE = choice_SGe.masked_fill(out_SG.unsqueeze(-1), float("-inf")).flatten(1)
        experts_SK = choice_SE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_SK = scores_SE.gather(1, experts_SK)
        if self.normalise:
            weights_SK = weights_SK / (weights_SK.sum(-1, keepdim=True) + 1e-20)
        return weights_SK * self.scale, experts_SK, scores_SE


class Experts(nn.Module):
    """The SwiGLU networks of this rank's experts, stacked."""

    def __init__(
        self,
        experts: int,
        width: int,
        expert_width: int,
        implementation: Literal["grouped_mm", "loop"],
    ) -> None:
        super().__init__()
        if implementation == "grouped_mm" and (width % 8 or expert_width % 8):
            fault = (
                f"grouped_mm needs hidden_size ({width}) and moe_intermediate_size "
                f"({expert_width}) to be multiples of"
            )
            raise InputError(fault + " 8 (16 bytes of bf16); use --model.experts loop")
        self.compute = (
            grouped_swiglu if implementation == "grouped_mm" else grouped_swiglu_reference
        )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))

    def forward(self, x_RD: Tensor, offs: Tensor) -> Tensor:
        """y_RD of rows sorted by local expert; offs int32, offs[e] ends the rows of local expert e,
        offs[-1] = R.
        """
        return self.compute(x_RD, local(self.gate_up_proj), local(self.down_proj), offs)


def local_exchange(
    x_RD: Tensor, counts_E: Tensor, experts: Experts, meanwhile: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Run the rows (sorted by expert, counts_E of each) through experts that are all on this
    rank.
    """
    return experts(x_RD, counts_E.cumsum(0).to(torch.int32)), meanwhile()


class _AddLoss(torch.autograd.Function):
    """Passes x on and makes `loss` part of what is minimised: its gradient is 1 whatever x's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


class MoE(nn.Module):
    """Router, routed experts and shared experts."""

    # Both since they were last zeroed, over real tokens; not saved.
    expert_load: Tensor  # int64 [E]: tokens routed to each expert in training mode
    balance_loss: Tensor  # fp32 scalar: sum of the balance loss

    def __init__(self, gate: Router, experts: Experts, shared_experts: SwigluMLP) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        self.exchange: Exchange = local_exchange  # expert parallelism puts its all-to-all here
        # What the balance loss is multiplied with in the gradient: its factor over the tokens of
        # the global batch, set before each step; 0 leaves it out.
        self.balance_scale = 0.0
        self.counting = True  # False while a forward pass is repeated for the backward pass
        self.register_buffer(
            "expert_load", torch.zeros(gate.weight.shape[0], dtype=torch.int64), persistent=False
        )
        self.register_buffer("balance_loss", torch.zeros((), dtype=torch.float32), persistent=False)

    def init_buffers(self) -> None:
        """Zero the counters."""
        self.expert_load.zero_()
        self.balance_loss.zero_()

    def forward(self, x_SD: Tensor, packing: Packing) -> Tensor:
        """x_SD to y_SD. Padding goes round the experts with weight 0 and is not counted."""
        weights_SK, experts_SK, scores_SE = self.gate(x_SD)
        valid_S1 = packing.valid_S.unsqueeze(1)
        if self.training and self.balance_scale:
            weights_SK = self.add_balance_loss(weights_SK, experts_SK, scores_SE, packing)
        spread_SK = torch.arange(experts_SK.numel(), device=x_SD.device).view_as(experts_SK) % len(
            self.expert_load
        )
        experts_SK = torch.where(valid_S1, experts_SK, spread_SK)
        weights_SK = torch.where(valid_S1, weights_SK, 0)
        chosen_R = experts_SK.flatten()
        # Counted by scatter: bincount asks the device for its largest value.
        counts_E = torch.zeros_like(self.expert_load).scatter_add_(
            0, chosen_R, torch.ones_like(chosen_R)
        )
        if self.training and self.counting:
            self.expert_load.scatter_add_(
                0, chosen_R, valid_S1.expand_as(experts_SK).flatten().long()
            )

        order_R = chosen_R.argsort(stable=True)
        row_SK = torch.empty_like(order_R)
        row_SK[order_R] = torch.arange(len(order_R), device=x_SD.device)
        row_SK = row_SK.view_as(experts_SK)
        y_RD, shared_SD = self.exchange(
            permute(x_SD, order_R, row_SK),
            counts_E,
            self.experts,
            lambda: self.shared_experts(x_SD),
        )
        return combine(y_RD, weights_SK, order_R, row_SK) + shared_SD

    def add_balance_loss(
        self, weights_SK: Tensor, experts_SK: Tensor, scores_SE: Tensor, packing: Packing
    ) -> Tensor:
        """`weights_SK` as they are, carrying the gradient of the sequence-wise balance loss
        (arXiv:2412.19437, eq. 17 to 20).

        Of a document of L tokens: sum over experts of f_e * P_e, with f_e = E / (K L) * (times e
            was chosen) and P_e the mean
        of its scores, normalised per token. A document counts L times, so that the mean over tokens
        is 1 where all experts are used alike, and how documents are packed, split over ranks and
        accumulated changes nothing. Chosen means routed to (the paper's formula leaves out the
        correction bias there).
        """
        documents, experts = len(packing.length_N1), scores_SE.shape[1]
        index_R = (packing.document_S.unsqueeze(1) * experts + experts_SK).flatten()
        counts = torch.zeros(documents * experts, device=scores_SE.device)
        counts.index_add_(0, index_R, torch.ones_like(index_R).float())
        counts_NE = packing.layout.sum(counts).view(documents, experts)
        frequency_NE = (
            counts_NE
            * (experts / experts_SK.shape[1])
            / packing.length_N1.clamp(min=1).unsqueeze(1)
        )
        share_SE = scores_SE / scores_SE.sum(-1, keepdim=True)
        loss_S = (frequency_NE[packing.document_S] * share_SE).sum(-1)
        loss = torch.where(packing.valid_S, loss_S, 0).sum()
        if self.counting:
            self.balance_loss += loss.detach()
        return _AddLoss.apply(weights_SK, loss * self.balance_scale)
