"""The routers that several families share: how tokens choose their experts.

Shape suffixes: S tokens on this rank, E experts, G expert groups, K choices per token.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchsft.models.decoder import Float32Buffers
from torchsft.models.moe import Routing, router_logits
from torchsft.ops.repetition import once


def within_open_groups(choice_SE: Tensor, groups: int, top_groups: int, rivals: int) -> Tensor:
    """Return scores of a choice, -inf for experts of groups that are closed to their token.

    Experts are split into groups of neighbours, which compete by the sum of their `rivals` best
    scores for `top_groups` places. (A fill of 0, as in DeepSeek's first public code, would let
    closed ones win over negative biased scores; transformers 5 uses -inf too.)
    """
    if top_groups == groups:
        return choice_SE
    choice_SGe = choice_SE.unflatten(1, (groups, -1))
    group_scores_SG = choice_SGe.topk(rivals, dim=-1).values.sum(-1)
    best_groups = group_scores_SG.topk(top_groups, dim=-1, sorted=False).indices
    out_SG = torch.ones_like(group_scores_SG, dtype=torch.bool)
    out_SG.scatter_(1, best_groups, False)
    return choice_SGe.masked_fill(out_SG.unsqueeze(-1), float("-inf")).flatten(1)


class GroupedRouter(Float32Buffers):
    """Chooses K (`top_k`) of E experts for every token, by scores of which the families differ;
    everything here is fp32 whatever the model computes in.

    Experts are split into G groups of neighbours, and those of `top_groups` groups may be chosen.
    `normalise` divides a token's K weights by their sum; `scale` is the factor of the weights after
    that.
    """

    regions = ("score", "choose", "weigh")  # see models/decoder.py
    rivals: ClassVar[int]  # by the sum of how many of its best scores a group competes

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        top_k: int,
        normalise: bool,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups = top_k, groups, top_groups
        self.normalise, self.scale = normalise, scale
        self.weight = nn.Parameter(torch.empty(experts, width))

    @abstractmethod
    def score(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, scores and, without a gradient, what the choice follows; each [S, E]."""

    def forward(self, x_SD: Tensor) -> Routing:
        """Choose experts; where a layer is computed again, those of the first pass."""
        logits_SE, scores_SE, choice_SE = self.score(x_SD)
        experts_SK = once("choice", lambda: self.choose(choice_SE))
        return Routing(self.weigh(scores_SE, experts_SK), experts_SK, scores_SE, logits_SE)

    def choose(self, choice_SE: Tensor) -> Tensor:
        """Return the experts with the largest `choice_SE` in open groups, int64 [S, K]."""
        open_SE = within_open_groups(choice_SE, self.groups, self.top_groups, self.rivals)
        return open_SE.topk(self.top_k, dim=-1, sorted=False).indices

    def weigh(self, scores_SE: Tensor, experts_SK: Tensor) -> Tensor:
        """Return the weights of the chosen experts, fp32 [S, K], which are their scores."""
        weights_SK = scores_SE.gather(1, experts_SK)
        if self.normalise:
            # sigmoid scores of a token can all be 0
            weights_SK = weights_SK / (weights_SK.sum(-1, keepdim=True) + 1e-20)
        return weights_SK * self.scale


class GroupedSigmoidRouter(GroupedRouter):
    """Weighs experts by sigmoid scores; a correction bias takes part in the choice alone. Groups
    compete by their two best biased scores.
    """

    rivals = 2
    e_score_correction_bias: Tensor

    def __init__(self, width: int, experts: int, **options: Any) -> None:
        super().__init__(width, experts, **options)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def score(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, scores and biased scores."""
        logits_SE = router_logits(x_SD, self.weight)
        scores_SE = logits_SE.sigmoid()
        return logits_SE, scores_SE, scores_SE.detach() + self.e_score_correction_bias


class SoftmaxRouter(GroupedRouter):
    """Weighs experts by softmax scores, which `normalise` makes the softmax over the chosen logits.
    Groups compete by their best score.
    """

    rivals = 1

    def __init__(self, width: int, experts: int, *, bias: bool = False, **options: Any) -> None:
        super().__init__(width, experts, **options)
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None

    def score(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, and scores twice."""
        logits_SE = router_logits(x_SD, self.weight, self.bias)
        scores_SE = logits_SE.softmax(-1)
        return logits_SE, scores_SE, scores_SE.detach()
