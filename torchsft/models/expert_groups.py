"""What families with DeepSeek's mixture of experts share: dense layers first, then layers with
shared experts and routed ones, which form groups; and the router that V3 chooses these with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.config_json import refuse_if
from torchsft.models.family import FamilyConfig, FamilyModel
from torchsft.models.routers import GroupedSigmoidRouter


@dataclass(frozen=True, kw_only=True)
class ExpertGroupsConfig(FamilyConfig):
    """Sizes and constants of a model whose layers have experts, behind dense ones."""

    # Sizes without which no parameter has a shape.
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    # The defaults are what transformers assumes where config.json is silent.
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0

    rivals: ClassVar[int]  # by the sum of how many of its best scores a group of experts competes

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_shared_experts", "n_group", "topk_group"):
            self.check_positive(name)
        experts, groups, open_groups = self.n_routed_experts, self.n_group, self.topk_group
        refuse_if(
            experts % groups,
            f"{experts} n_routed_experts, which n_group ({groups}) does not divide",
        )
        refuse_if(
            open_groups > groups, f"topk_group = {open_groups}, but only {groups} groups (n_group)"
        )
        each = f"{experts} n_routed_experts in {groups} groups"
        refuse_if(
            open_groups < groups and experts // groups < self.rivals,
            f"{each}, but groups compete by their best two",
        )
        chosen, reachable = self.num_experts_per_tok, experts // groups * open_groups
        few = f"the {open_groups} groups open to a token (topk_group) hold only {reachable} experts"
        refuse_if(chosen > reachable, f"num_experts_per_tok = {chosen}, but {few}")

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses; 0: it is dense."""
        return self.n_routed_experts if layer >= self.first_k_dense_replace else 0

    @property
    def expert_costs(self) -> tuple[int, int]:
        """Inner width of an expert, and how many a token meets: routed and shared ones."""
        return self.moe_intermediate_size, self.num_experts_per_tok + self.n_shared_experts


@dataclass(frozen=True, kw_only=True)
class SigmoidGroupsConfig(ExpertGroupsConfig):
    """Sizes and constants of a model with V3's router and, it may be, MTP layers."""

    norm_topk_prob: bool = True
    # MTP layers that the checkpoint may hold behind the last layer
    num_nextn_predict_layers: int | None = None

    supported_values: ClassVar[Mapping[str, Any]] = {
        **ExpertGroupsConfig.supported_values,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    spellings = (
        ("n_routed_experts", "num_local_experts"),
        ("num_nextn_predict_layers", "num_mtp_layers"),
    )
    rivals = 2

    @property
    def mtp_layers(self) -> int | None:
        """MTP layers that the checkpoint may hold; None where config.json does not say."""
        return self.num_nextn_predict_layers


class SigmoidGroupsModel(FamilyModel):
    """A family with V3's router; see `LanguageModel`."""

    config: SigmoidGroupsConfig

    def build_router(self) -> GroupedSigmoidRouter:
        """Make the router of a layer with experts."""
        config = self.config
        return GroupedSigmoidRouter(
            config.hidden_size,
            config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
