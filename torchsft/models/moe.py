"""Mixture of experts with DeepSeek-V3's router: sigmoid scores, a selection-only correction bias, group-limited top-k.

Shape suffixes: T tokens, D width, E experts, G expert groups, K choices per token, R = T * K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchsft.config import InputError
from torchsft.models.decoder import Float32Buffers, SwigluMLP
from torchsft.ops.permute import combine, permute
from torchsft.ops.swiglu import grouped_swiglu, grouped_swiglu_reference

Exchange = Callable[[Tensor, Tensor, "Experts"], Tensor]


class Router(Float32Buffers):
    """Chooses K of E experts for every token; everything here is fp32 whatever the model computes in."""

    e_score_correction_bias: Tensor

    def __init__(
        self, width: int, experts: int, *, top_k: int, groups: int, top_groups: int, normalise: bool, scale: float
    ) -> None:
        """
        Args:
            width: D.
            experts: E.
            top_k: K.
            groups: G; experts are split into G groups of neighbours.
            top_groups: groups whose experts may be chosen.
            normalise: divide a token's K weights by their sum.
            scale: factor of the weights after that.
        """
        super().__init__()
        self.top_k, self.groups, self.top_groups = top_k, groups, top_groups
        self.normalise, self.scale = normalise, scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Routing weights (fp32 [T, K]) and the chosen experts (int64 [T, K]).

        Weights are the sigmoid scores; the correction bias takes part in the choice alone. Groups compete by the sum of
        their two best biased scores, and experts of the other groups are out (-inf: a fill of 0, as in DeepSeek's first
        public code, lets them win over negative biased scores; transformers 5 uses -inf too).
        """
        scores_TE = F.linear(x_TD.float(), self.weight.float()).sigmoid()
        choice_TE = scores_TE.detach() + self.e_score_correction_bias
        if self.top_groups < self.groups:
            choice_TGe = choice_TE.unflatten(1, (self.groups, -1))
            group_scores_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
            best_groups = group_scores_TG.topk(self.top_groups, dim=-1, sorted=False).indices
            out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_groups, False)
            choice_TE = choice_TGe.masked_fill(out_TG.unsqueeze(-1), float("-inf")).flatten(1)
        experts_TK = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * self.scale, experts_TK


class Experts(nn.Module):
    """The SwiGLU networks of this rank's experts, stacked."""

    def __init__(self, experts: int, width: int, expert_width: int, implementation: Literal["grouped_mm", "loop"]) -> None:
        super().__init__()
        if implementation == "grouped_mm" and (width % 8 or expert_width % 8):
            raise InputError(
                f"grouped_mm needs hidden_size ({width}) and moe_intermediate_size ({expert_width}) to be multiples of"
                " 8 (16 bytes of bf16); use --model.experts loop"
            )
        self.compute = grouped_swiglu if implementation == "grouped_mm" else grouped_swiglu_reference
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))

    def forward(self, x_RD: Tensor, offs: Tensor) -> Tensor:
        """y_RD of rows sorted by local expert; offs int32, offs[e] ends the rows of local expert e, offs[-1] = R."""
        return self.compute(x_RD, _local(self.gate_up_proj), _local(self.down_proj), offs)


def _local(parameter: Tensor) -> Tensor:
    """This rank's experts. Their gradient is whole on each rank (it has seen all rows of its experts)."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)


def local_exchange(x_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
    """Run the rows (sorted by expert, counts_E of each) through experts that are all on this rank."""
    return experts(x_RD, counts_E.cumsum(0).to(torch.int32))


class MoE(nn.Module):
    """Router, routed experts and shared experts.

    Attributes:
        exchange: `exchange(x_RD, counts_E, experts) -> y_RD`, rows sorted by global expert; expert parallelism puts its
            all-to-all here.
        expert_load: int64 [E], not saved: real tokens routed to each expert in training mode since it was last zeroed.
    """

    expert_load: Tensor

    def __init__(self, gate: Router, experts: Experts, shared_experts: SwigluMLP) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts
        self.exchange: Exchange = local_exchange
        count = gate.weight.shape[0]
        self.register_buffer("expert_load", torch.zeros(count, dtype=torch.int64), persistent=False)

    def init_buffers(self) -> None:
        """Zero the load."""
        self.expert_load.zero_()

    def forward(self, x_TD: Tensor, valid_T: Tensor) -> Tensor:
        """x_TD to y_TD. Padding (valid_T False) goes round the experts with weight 0 and is not counted."""
        weights_TK, experts_TK = self.gate(x_TD)
        count = len(self.expert_load)
        valid_T1 = valid_T.unsqueeze(1)
        spread_TK = torch.arange(experts_TK.numel(), device=x_TD.device).view_as(experts_TK) % count
        experts_TK = torch.where(valid_T1, experts_TK, spread_TK)
        weights_TK = torch.where(valid_T1, weights_TK, 0)
        chosen_R = experts_TK.flatten()
        # Counted by scatter: bincount asks the device for its largest value.
        counts_E = torch.zeros_like(self.expert_load).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))
        if self.training:
            self.expert_load.scatter_add_(0, chosen_R, valid_T1.expand_as(experts_TK).flatten().long())

        order_R = chosen_R.argsort(stable=True)
        row_TK = torch.empty_like(order_R)
        row_TK[order_R] = torch.arange(len(order_R), device=x_TD.device)
        row_TK = row_TK.view_as(experts_TK)
        y_RD = self.exchange(permute(x_TD, order_R, row_TK), counts_E, self.experts)
        return combine(y_RD, weights_TK, order_R, row_TK) + self.shared_experts(x_TD)
