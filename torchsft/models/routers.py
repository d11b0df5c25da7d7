"""The routers that several families share: how tokens choose their experts.

Shape suffixes: S tokens on this rank, E experts, G expert groups, K choices per token.
"""

import torch
from torch import Tensor, nn

from torchsft.models.decoder import Float32Buffers
from torchsft.models.moe import Routing, router_logits


class GroupedSigmoidRouter(Float32Buffers):
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

    def forward(self, x_SD: Tensor) -> Routing:
        """Choose experts. Weights are the sigmoid scores; the correction bias takes part in the
        choice alone.

        Groups compete by the sum of their two best biased scores, and experts of the other groups
        are out (-inf: a fill of 0, as in DeepSeek's first public code, lets them win over negative
        biased scores; transformers 5 uses -inf too).
        """
        logits_SE = router_logits(x_SD, self.weight)
        scores_SE = logits_SE.sigmoid()
        choice_SE = scores_SE.detach() + self.e_score_correction_bias
        if self.top_groups < self.groups:
            choice_SGe = choice_SE.unflatten(1, (self.groups, -1))
            group_scores_SG = choice_SGe.topk(2, dim=-1).values.sum(-1)
            best_groups = group_scores_SG.topk(self.top_groups, dim=-1, sorted=False).indices
            out_SG = torch.ones_like(group_scores_SG, dtype=torch.bool)
            out_SG.scatter_(1, best_groups, False)
            choice_SE = choice_SGe.masked_fill(out_SG.unsqueeze(-1), float("-inf")).flatten(1)
        experts_SK = choice_SE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_SK = scores_SE.gather(1, experts_SK)
        if self.normalise:
            weights_SK = weights_SK / (weights_SK.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights_SK * self.scale, experts_SK, scores_SE, logits_SE)


class SoftmaxRouter(nn.Module):
    """Chooses the K (`top_k`) of E experts with the largest softmax scores, which weigh them;
    `normalise` divides a token's K weights by their sum, which makes them the softmax over the
    chosen logits. Everything here is fp32.
    """

    def __init__(
        self, width: int, experts: int, *, top_k: int, normalise: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.top_k, self.normalise = top_k, normalise
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None

    def forward(self, x_SD: Tensor) -> Routing:
        """Choose experts."""
        logits_SE = router_logits(x_SD, self.weight, self.bias)
        scores_SE = logits_SE.softmax(-1)
        weights_SK, experts_SK = scores_SE.topk(self.top_k, dim=-1, sorted=False)
        if self.normalise:
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        return Routing(weights_SK, experts_SK, scores_SE, logits_SE)
